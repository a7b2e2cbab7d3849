"""Notes on how a tokenizer's files were read."""

from __future__ import annotations

from pathlib import Path

from runner.cli.shared.output import Output


def note_tokenizer(output: Output, folder: Path) -> None:
    """Note what of the tokenizer's files in a folder was altered or guessed.

    Raises:
        FileFault: the folder has no tokenizer, or its files are damaged.
    """
    from runner.data.making.tokenizer import notes

    for note in notes(folder):
        output.note(note)
