"""`gptj data merge`: join the shards that several machines have made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.data.building import count_fields
from runner.cli.shared.command import command
from runner.cli.shared.options import PATH, force_option, out_option
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow


@command(
    "gptj data merge shards --out data",
    "gptj data merge node-1/shards node-2/shards --out data --copy",
)
@click.argument("folders", metavar="DIR...", type=PATH, nargs=-1, required=True)
@out_option(required=True)
@click.option(
    "--copy",
    is_flag=True,
    help="Copy the record files instead of linking to them, as another file system needs.",
)
@force_option
def merge(
    output: Output, folders: tuple[Path, ...], out: Path, copy: bool, force: bool
) -> dict[str, Any]:
    """Join the shards of `gptj data … --shard I/N` to one folder of records.

    DIR is a shard, or a folder that holds shards. All shards of one job must be there exactly once,
    made by the same options and versions from the same sources. The record files of the output
    are hard links to those of the shards, numbered in the order of the shards: the output takes no
    space of its own, and stays whole when the shards are deleted.
    """
    from runner.data import merge as merging

    work = merging.merge(folders, out, copy=copy, force=force)
    result = follow(output, "copying" if copy else "linking", work)
    for name, counts in result.counts.items():
        output.note(
            f"{name + ': ' if name else ''}{counts.documents:,} documents, {counts.tokens:,} "
            f"tokens in {counts.examples:,} examples of {counts.files:,} files"
        )
    how = f"copied, {result.bytes / 1e6:.1f} MB" if copy else "linked, not copied"
    output.note(f"joined {result.shards} shards: their record files are {how}")
    output.data(str(out))
    return {"output": str(out), "shards": result.shards, **count_fields(result.counts)}
