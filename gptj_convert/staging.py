"""An output folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from gptj_model.errors import UsageError


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
