"""Options that the commands under `gptj data` share."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from runner.cli.data.shard import shard_option
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import (
    COUNT,
    PATH,
    PLACE,
    force_option,
    options,
    out_option,
    resume_option,
    tokenizer_option,
)

_PROBABILITY = click.FloatRange(min=0, max=1)

#: Options of every command that makes records.
building_options = options(
    click.argument("sources", metavar="SRC...", type=PLACE, nargs=-1),
    tokenizer_option(required=True),
    click.option(
        "--allow-special",
        is_flag=True,
        help="Read the name of a special token in a text, such as <|endoftext|>, as that token "
        "instead of as text.",
    ),
    click.option(
        "--max-sequence-length",
        type=COUNT,
        default=2048,
        show_default=True,
        help="Number of tokens per example.",
    ),
    out_option(Path("data"), kind=PLACE),
    click.option(
        "--staging",
        type=PATH,
        metavar="DIR",
        help="Folder in which records are made, as NAME.staging-gptj, before they are uploaded to "
        "an --out in object storage.  [default: the current folder]",
    ),
    click.option(
        "--format",
        "file_format",
        type=click.Choice(["tfrecord", "hdf5"]),
        default="tfrecord",
        show_default=True,
        help="Format of the records; hdf5 is what the current CS client reads.",
    ),
    click.option("--gzip", "compress", is_flag=True, help="Compress the TFRecords with gzip."),
    click.option(
        "--files-per-record",
        type=COUNT,
        default=8192,
        show_default=True,
        help="Number of examples per record file.",
    ),
    click.option(
        "--write-remainder/--no-write-remainder",
        default=True,
        show_default=True,
        help="Write the last record file although it is not full.",
    ),
    click.option(
        "--processes",
        type=COUNT,
        help="Number of tokenizer processes. Does not change the output.  "
        "[default: the number of cores, or 1 where threads are faster]",
    ),
    click.option(
        "--on-error",
        type=click.Choice(["stop", "skip"]),
        default="stop",
        show_default=True,
        help="What to do with a malformed document.",
    ),
    shard_option,
    resume_option,
    force_option,
)

#: Options of the commands that pack documents into sequences.
packing_options = options(
    click.option(
        "--short-seq-prob",
        type=_PROBABILITY,
        default=0.0,
        show_default=True,
        help="Share of sequences that are shortened by a random number of tokens.",
    ),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Seed of --short-seq-prob."
    ),
    click.option(
        "--reference-remainder",
        is_flag=True,
        help="Drop the tokens that the reference drops: those of the last, incomplete sequence, "
        "and those that --short-seq-prob cuts off.",
    ),
    click.option(
        "--ftfy", is_flag=True, help="Repair mojibake and normalize Unicode with the ftfy library."
    ),
    click.option(
        "--ftfy-normalizer",
        type=click.Choice(["NFC", "NFKC"]),
        default="NFC",
        show_default=True,
        help="Unicode normal form that --ftfy writes.",
    ),
    click.option("--wikitext-detokenize", is_flag=True, help="Undo the tokenization of WikiText."),
)


def rules(
    *, packing: bool, downloading: bool, exclusive: tuple[tuple[str, ...], ...] = ()
) -> OptionRules:
    """Return the rules of a command that makes records.

    Args:
        packing: whether it has `packing_options`.
        downloading: whether it has the options of `runner.cli.data.download`.
        exclusive: groups of its own options of which one at most may be given.
    """
    needs: dict[str, str] = {}
    if packing:
        needs |= {"--ftfy-normalizer": "--ftfy"}
    if downloading:
        needs |= {"--repository": "--download", "--part": "--download"}
    return OptionRules(
        mode=lambda values: f"--format {values['file_format']}",
        takes={"--format tfrecord": ("--gzip",), "--format hdf5": ()},
        needs=needs,
        exclusive=(("--resume", "--force"), *exclusive),
    )
