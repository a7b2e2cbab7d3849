"""`--out` in object storage: records are made in a folder of this machine, then uploaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import rich_click as click

if TYPE_CHECKING:
    from runner.data.making.build import BuildResult, Options, Recipe
    from runner.data.making.sources import Part
    from runner.data.remote.upload import Upload


def upload_of(
    out: Path, staging: Path | None, files: Sequence[Path], *, resume: bool, force: bool
) -> Upload | None:
    """Return the upload that `--out` asks for, or None if it is a folder of this machine.

    Raises:
        UsageError: the output exists, or --staging is given for a folder of this machine.
        FileFault: the storage cannot be used, or the disk is too small.
    """
    from runner.data.making.sources import TEST, TRAIN, VALIDATION
    from runner.data.remote.path import as_remote, identity
    from runner.data.remote.upload import Upload

    if not (address := as_remote(out)):
        if staging:
            raise click.UsageError("--staging has no effect unless --out is in object storage")
        return None
    parts = (TRAIN, VALIDATION, TEST)
    upload = Upload(address, staging, resume=resume, force=force, parts=parts)
    upload.refuse_a_full_disk(sum(identity(file)[0] for file in files))
    return upload


def refuse_sources(here: Path, out: Path, files: Sequence[Path]) -> None:
    """Refuse an output that would replace a source.

    Args:
        here: folder of this machine in which records are made.
        out: output that was asked for: the same folder, or an address.
        files: source files.

    Raises:
        UsageError: output and source overlap.
    """
    from gptj_convert.files.output_folder import refuse_overlap
    from gptj_model.errors import UsageError
    from runner.data.remote.path import as_remote

    for file in files:
        if not as_remote(file):
            refuse_overlap(here, file, [file])
        elif str(file).startswith(f"{out}/"):
            raise UsageError(
                f"{out}: holds the source file {file}", hint="choose another address with --out"
            )


def complete_upload(
    upload: Upload,
    parts: Sequence[Part],
    recipe: Recipe,
    options: Options,
    shard: Mapping[str, Any] | None,
) -> BuildResult | None:
    """Return the result of the same command that was uploaded completely, or None if some of it is
    missing.

    Raises:
        UsageError: the output is of another command.
    """
    from gptj_model.errors import UsageError
    from runner.data.making.build import find_complete

    if upload.has_begun or not upload.is_complete:
        return None
    with TemporaryDirectory() as folder:
        whole = upload.fetch_statements(Path(folder))
        found = find_complete(parts, recipe, Path(folder), options, shard)
    if found is None:
        raise UsageError(
            f"{upload.address}: already exists, made from other sources or with other options",
            hint="choose another address with --out, or replace this one with --force",
        )
    if not whole:
        upload.repair()
        return None
    upload.discard()
    return found
