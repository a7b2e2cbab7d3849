"""`gptj data instruct`: examples of instructions, prompts and chats."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.data.building import build_records, named_sources
from runner.cli.data.options import building_options, rules
from runner.cli.shared.command import command
from runner.cli.shared.output import Output
from runner.cli.shared.tokenizer_notes import note_tokenizer
from runner.data.making.file_patterns import ROW_FILES

if TYPE_CHECKING:
    from runner.data.making.instruction.templates import Template


@command(
    "gptj data instruct alpaca_data.json --tokenizer gpt-j-6b --out alpaca",
    "gptj data instruct faq.csv --columns prompt=question,completion=answer --tokenizer gpt-j-6b",
    rules=rules(packing=False, downloading=False),
)
@building_options
@click.option(
    "--template",
    metavar="NAME|FILE",
    help="Template of the text: alpaca, dolly, plain, plain-chat, chat (the tokenizer's own), or "
    "a Jinja file.  [default: by the shape of the records]",
)
@click.option(
    "--columns",
    metavar="KEY=NAME,...",
    help="Names that the records use for the keys of a shape, such as "
    "prompt=question,completion=answer.",
)
@click.option(
    "--train-on-prompt",
    is_flag=True,
    help="Count every token in the loss, instead of only the completions.",
)
@click.option(
    "--packing/--no-packing",
    default=True,
    show_default=True,
    help="Put as many whole examples into a sequence as fit, instead of one.",
)
@click.option(
    "--too-long",
    type=click.Choice(["cut", "skip", "stop"]),
    default="skip",
    show_default=True,
    help="What to do with an example that is longer than a sequence.",
)
def instruct(
    output: Output,
    sources: tuple[Path, ...],
    template: str | None,
    columns: str | None,
    train_on_prompt: bool,
    packing: bool,
    too_long: str,
    **options: Any,
) -> dict:
    """Make examples of instructions, prompts or chats; the loss counts only their completions.

    SRC are files or folders of .jsonl, .json, .csv, .tsv (also compressed), .parquet and .arrow.
    The keys of a record say what it is: prompt and completion; instruction and output, with input
    or not; instruction and response, with context or not; messages; or conversations. An example
    that breaks a rule stops the command, or is counted by reason with --on-error skip.
    """
    from runner.data.making.instruction.encoder import InstructOptions, InstructRecipe
    from runner.data.making.instruction.shapes import Columns
    from runner.data.making.sources import by_split, find_source_files

    tokenizer = options.pop("tokenizer")
    note_tokenizer(output, tokenizer)
    templates = _templates(template, tokenizer)
    has_date = any(t.has_date for t in templates.values())
    recipe = InstructRecipe(
        options=InstructOptions(
            tokenizer=tokenizer,
            length=options.pop("max_sequence_length"),
            templates=templates,
            columns=Columns.parse(columns) if columns is not None else Columns(),
            allow_special=options.pop("allow_special"),
            train_on_prompt=train_on_prompt,
            packing=packing,
            too_long=too_long,
            date=date.today().isoformat() if has_date else "",
        )
    )
    found = find_source_files(named_sources(sources), ROW_FILES)
    return build_records(output, sources, found, by_split(found), recipe, **options)


def _templates(name: str | None, tokenizer: Path) -> dict[str, Template]:
    """Return the template of each kind of samples, of which a name sets all."""
    from runner.data.making.instruction.shapes import CHAT, COMPLETION, INSTRUCTION
    from runner.data.making.instruction.templates import find_template, tokenizers_template

    if name is not None:
        return dict.fromkeys((INSTRUCTION, COMPLETION, CHAT), find_template(name, tokenizer))
    own = tokenizers_template(tokenizer) if tokenizer.is_dir() else None
    return {
        INSTRUCTION: find_template("alpaca", tokenizer),
        COMPLETION: find_template("plain", tokenizer),
        CHAT: own or find_template("plain-chat", tokenizer),
    }
