"""An output folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from gptj_model.errors import UsageError


def refuse_overlap(out: Path, source: Path, files: Iterable[Path]) -> None:
    """Refuse an output inside its source, or one that would replace it; links are followed.

    Args:
        out: the folder to make.
        source: what was asked for; a folder, or something else that holds nothing.
        files: that are read.

    Raises:
        UsageError: it does not lie apart.
    """
    hint = "choose a folder beside it with --out"
    real, folder = (Path(os.path.realpath(p)) for p in (out, source))
    if folder.is_dir() and real.is_relative_to(folder):
        place = "is the source itself" if real == folder else f"is inside the source {source}"
        raise UsageError(f"{out}: {place}", hint=hint)
    for file in files:
        # A link and what it leads to are both needed.
        places = (Path(os.path.realpath(file)), Path(os.path.realpath(file.parent)))
        if any(place.is_relative_to(real) for place in places):
            raise UsageError(f"{out}: holds {file}, which is read", hint=hint)


@contextmanager
def staged_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A new folder beside `out` that takes its name once the body is done.

    With `force` an existing `out` lives until the new one is durable, then goes. If the body
    fails, the staging folder is removed and `out` is as it was.

    Raises:
        UsageError: `out` exists and `force` is off.
        OSError: the disk is full or not writable.
    """
    if (out.exists() or out.is_symlink()) and not force:
        raise UsageError(
            f"{out}: exists already, and is never overwritten",
            hint="choose another folder with --out, or replace this one with --force",
        )
    if out.is_symlink() or out.is_file():
        raise UsageError(f"{out}: is not a folder, expected a name for one")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    staging.chmod(0o755)
    try:
        yield staging
        for path in staging.iterdir():
            _sync(path)
        _sync(staging)
        _replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _replace(staging: Path, out: Path) -> None:
    old = None
    if out.exists():
        old = Path(mkdtemp(prefix=f"{out.name}.replaced-", dir=out.parent)) / out.name
        out.rename(old)
    try:
        staging.rename(out)
    except BaseException:
        if old:
            old.rename(out)
            old.parent.rmdir()
        raise
    _sync(out.parent)
    if old:
        shutil.rmtree(old.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
