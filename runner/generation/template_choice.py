"""Which template a prompt is rendered with: the one that is named, or that of the model's run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_model.errors import UsageError
from runner.data.making.instruction.run_templates import templates_of_run
from runner.data.making.instruction.shapes import CHAT, COMPLETION, INSTRUCTION
from runner.data.making.instruction.stated_templates import StatedTemplates, stated_templates
from runner.data.making.instruction.templates import (
    NAMES,
    Template,
    find_template,
    tokenizers_template,
)
from runner.data.making.tokenizer import facts
from runner.data.reading.data_params import DATA_PARAMS_FILE


@dataclass(frozen=True, slots=True)
class Chosen:
    """Templates that were chosen, and what people should know about the choice."""

    stated: StatedTemplates
    notes: tuple[str, ...]


def named_templates(name: str, tokenizer: Path) -> Chosen:
    """Return the templates of `--template`.

    Args:
        name: name of a built-in template, `chat`, path of a Jinja file, or folder of records.
        tokenizer: folder of the model and its tokenizer.

    Raises:
        UsageError: there is no such template, or it is not valid; or the folder states none.
        FileFault: a file cannot be read.
    """
    folder = Path(name)
    if name in NAMES or not folder.is_dir():
        return Chosen(_everywhere(find_template(name, tokenizer)), ())
    if stated := stated_templates(folder):
        return Chosen(stated, tuple(_notes(stated, str(folder), tokenizer)))
    raise UsageError(
        f"{folder}: holds no {DATA_PARAMS_FILE} with a template, expected records of "
        "`gptj data instruct`",
        hint=f"name a template instead: {', '.join(NAMES)}, or a Jinja file",
    )


def chat_templates(folder: Path) -> Chosen:
    """Return the template of `--chat`: the tokenizer's own, else those of the model's run.

    Args:
        folder: folder of the model and its tokenizer.

    Raises:
        UsageError: there is neither, or a template is not valid.
        GptjError: a file that may state them is damaged.
    """
    own, run = tokenizers_template(folder), templates_of_run(folder)
    if own:
        notes = ()
        if run and any(template.text != own.text for template in run.templates.values()):
            notes = (
                "note: --chat takes the tokenizer's chat template, and the records of the run were "
                f"made with {_named(run)}; --template names another",
            )
        return Chosen(_everywhere(own), notes)
    if run:
        return Chosen(run, tuple(_notes(run, f"the run {folder}", folder)))
    raise UsageError(
        f"{folder}: the tokenizer has no chat template, and the model's records are not known",
        hint="name the template with --template: plain-chat, alpaca, a Jinja file or the folder of "
        "the records",
    )


def _everywhere(template: Template) -> StatedTemplates:
    return StatedTemplates(templates=dict.fromkeys((INSTRUCTION, COMPLETION, CHAT), template))


def _named(stated: StatedTemplates) -> str:
    return " and ".join(dict.fromkeys(template.name for template in stated.templates.values()))


def _notes(stated: StatedTemplates, where: str, tokenizer: Path) -> Iterator[str]:
    yield f"note: prompts get the template {_named(stated)} of {where}"
    if stated.tokenizer_sha256 not in (None, facts(tokenizer)["tokenizer_sha256"]):
        yield (
            f"note: the tokenizer in {tokenizer} is not the one that the records were made with, "
            "so ids may differ"
        )
