"""`gptj generate`: continue one prompt, or the prompts of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.command import command
from runner.cli.shared.memory_budget import Load, MemoryBudget, execution_within, memory_option
from runner.cli.shared.model_choice import default_model, stated_execution
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import (
    COUNT,
    COUNT_OR_ZERO,
    PATH,
    execution_option,
    model_option,
)
from runner.cli.shared.output import Output
from runner.cli.shared.tokenizer_notes import note_tokenizer
from runner.config.execution import Execution

if TYPE_CHECKING:
    from gptj_convert.checkpoint.open import Checkpoint
    from gptj_model.decoding.generation import Generator
    from gptj_model.streaming.residency import Residency

RULES = OptionRules(
    needs={"--batch-size": "--prompts"},
    exclusive=(("--prompt", "--ids", "--prompts"),),
)


@command(
    "gptj generate --prompt 'The quick brown fox'",
    "gptj generate --model converted/ --ids 464,3290 --max-new-tokens 8",
    "gptj generate --prompts prompts.txt --temperature 0.8 --top-p 0.9 --seed 1",
    rules=RULES,
)
@model_option
@click.option("--prompt", help="Text to continue.")
@click.option("--ids", help="Token ids to continue, separated by commas, such as 464,3290.")
@click.option(
    "--prompts",
    "prompts_file",
    type=PATH,
    metavar="FILE",
    help="File of texts to continue, one per line; prints one JSON object per line.",
)
@click.option(
    "--batch-size",
    type=COUNT,
    default=8,
    show_default=True,
    help="Number of prompts of a file that are continued together.",
)
@click.option(
    "--max-new-tokens",
    type=COUNT,
    default=32,
    show_default=True,
    help="Largest number of tokens to add to a prompt.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Divisor of the logits before sampling; 0 takes the most likely token.",
)
@click.option(
    "--top-k",
    type=COUNT_OR_ZERO,
    default=0,
    help="Sample from the K most likely tokens; 0 means all.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    help="Sample from the most likely tokens whose probabilities add up to P.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Factor that makes tokens already in the text less likely, if above 1.",
)
@click.option(
    "--seed",
    type=COUNT_OR_ZERO,
    default=0,
    show_default=True,
    help="Seed of the sampling; each further prompt of a file takes the next seed.",
)
@execution_option
@memory_option
def generate(
    output: Output,
    model: Path | None,
    prompt: str | None,
    ids: str | None,
    prompts_file: Path | None,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int,
    execution: str | None,
    memory: int | None,
) -> dict[str, Any]:
    """Continue a prompt, given as text or as token ids, or every line of a file."""
    if prompt is None and ids is None and prompts_file is None:
        raise click.UsageError("nothing to continue: give --prompt, --ids or --prompts")
    texts = _read_lines(prompts_file) if prompts_file else None
    from runner.cli.shared import framework

    framework.prepare()
    from gptj_convert.resources.footprint import cache_bytes
    from gptj_convert.settings.generation_settings import stop_tokens, unapplied
    from gptj_model.decoding.generation import Generator, Sampling
    from runner.evaluation.restore import opened_model

    path = model or default_model()
    folder = path if path.is_dir() else path.parent
    tokenizer = (_tokenizer if ids is None else _tokenizer_if_any)(output, folder)
    if texts is not None:
        prompts = [tokenizer.encode(text).ids for text in texts]
    else:
        prompts = [_parse_ids(ids) if ids is not None else tokenizer.encode(prompt).ids]
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    budget = MemoryBudget(output, memory)

    def keep(checkpoint: Checkpoint) -> Residency:
        batch = min(batch_size, len(prompts))
        length = max(map(len, prompts)) + max_new_tokens
        states = cache_bytes(checkpoint.config, batch, length)
        return budget.keep(checkpoint, Load(batch=batch, length=length, states=states))

    way = execution_within(memory, execution, lambda: stated_execution(folder))
    with opened_model(path, keep=keep if way == Execution.STREAMING else None) as loaded:
        if asked := unapplied(folder, loaded.config):
            output.note(f"note: {asked}, of which nothing is applied: only the options count")
        generator = Generator(loaded, sampling, stop_at=stop_tokens(folder, loaded.config))
        if texts is None:
            made = _continue(output, generator, tokenizer, prompts[0], max_new_tokens)
            return made | budget.fields
        found = []
        for at in range(0, len(texts), batch_size):
            group = slice(at, at + batch_size)
            new = generator(prompts[group], max_new_tokens, first=at)
            for text, begun, more in zip(texts[group], prompts[group], new, strict=True):
                every = [*begun, *more]
                made = tokenizer.decode(every, skip_special_tokens=False)
                found.append({"prompt": text, "text": made, "ids": every})
                output.data(json.dumps(found[-1], ensure_ascii=False))
        return {"continuations": found, **budget.fields}


def _continue(
    output: Output, generator: Generator, tokenizer: Any, begun: list[int], max_new_tokens: int
) -> dict[str, Any]:
    """Print a text as it is generated, or the ids at the end where there is no tokenizer."""
    ids, shown = list(begun), ""
    for (token,) in generator.stream([begun], max_new_tokens):
        assert token is not None, "the stream ends instead"
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else ""
        # The bytes of a character may come in several tokens.
        if text.startswith(shown) and not text.endswith("\ufffd"):
            output.part(text[len(shown) :])
            shown = text
    text = tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else None
    if text is None:
        output.data(" ".join(map(str, ids)))
    else:
        output.data(text.removeprefix(shown))
    return {"ids": ids, "text": text}


def _read_lines(path: Path) -> list[str]:
    """Return the prompts of a file, one per line.

    Raises:
        DataFault: the file is empty, a line is empty, or the file is not UTF-8; with the line.
    """
    from gptj_model.errors import DataFault

    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise DataFault(f"{path}:{line}: is not UTF-8") from None
    if "" in lines:
        raise DataFault(f"{path}:{lines.index('') + 1}: is empty, expected a prompt on every line")
    return lines


def _tokenizer(output: Output, folder: Path) -> Any:
    """Return the model's tokenizer; a special token's name in a prompt is read as that token."""
    from runner.data.making.tokenizer import load_tokenizer

    note_tokenizer(output, folder)
    return load_tokenizer(folder, allow_special=None)


def _tokenizer_if_any(output: Output, folder: Path) -> Any:
    from gptj_model.errors import FileFault

    try:
        return _tokenizer(output, folder)
    except FileFault as fault:
        output.note(f"note: {fault.message}; ids are printed instead of text")
        return None


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--ids takes numbers separated by commas, found {text!r}") from None
