"""`gptj data`: text into training records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.command import PATH, command
from runner.cli.output import Output
from runner.cli.progress import progress

DEFAULT_OUT = Path("data")


@click.group()
def data() -> None:
    """Make training records."""


@command
@click.argument("sources", metavar="SRC...", type=PATH, nargs=-1, required=True)
@click.option("--tokenizer", type=PATH, required=True, help="Folder with tokenizer.json.")
@click.option("--max-sequence-length", type=click.IntRange(min=1), default=2048, show_default=True)
@click.option("--out", type=PATH, default=DEFAULT_OUT, show_default=True, help="Folder to make.")
@click.option(
    "--glob",
    "patterns",
    multiple=True,
    default=["*"],
    show_default=True,
    help="Which files of folders to take; may be repeated.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At a file that is not UTF-8.",
)
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def text(
    output: Output,
    sources: tuple[Path, ...],
    tokenizer: Path,
    max_sequence_length: int,
    out: Path,
    patterns: tuple[str, ...],
    on_error: str,
    force: bool,
) -> dict[str, Any]:
    """Pack text or source files, one document each, into TFRecords."""
    from dataclasses import asdict

    from runner.cli import tensorflow

    tensorflow.prepare()
    from runner.data.text import Counts, find_texts, load_tokenizer, pack

    counts = Counts()
    loaded = load_tokenizer(tokenizer)
    texts = find_texts(sources, patterns)
    with progress(output, "packing") as report:
        for event in pack(
            texts,
            loaded,
            out,
            counts,
            length=max_sequence_length,
            skip_bad=on_error == "skip",
            force=force,
        ):
            report(event.done, event.total, event.what)
    output.note(
        f"{counts.documents:,} documents ({counts.skipped} skipped), {counts.bytes / 1e6:.1f} MB "
        f"→ {counts.tokens:,} tokens in {counts.examples:,} examples of {max_sequence_length}"
    )
    output.data(str(out))
    return {"output": str(out), **asdict(counts)}


text.name = "text"
data.add_command(text)
