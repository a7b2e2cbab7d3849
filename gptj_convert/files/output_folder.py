"""An output folder that appears complete or not at all.

Beside `OUT` the folder `OUT.partial-gptj` holds, while the work goes on, `content` (what becomes
OUT), a lock, and what the work notes for its own resumption.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gptj_convert.files.lock_file import hold
from gptj_model.errors import FileFault, UsageError

SUFFIX = ".partial-gptj"
_CONTENT = "content"
_LOCK = "lock"
_REPLACED = "replaced"
#: Names of the files that outputs hold.
_WRITTEN = (
    *(
        "*.json",
        "*.jsonl",
        "*.yaml",
        "*.jinja",
        "merges.txt",
        "vocab.bpe",
        "LICENSE*",
        "README.md",
        "checkpoint",
    ),
    *("*.safetensors", "*.bin", "*.pt", "*.ckpt*", "*.h5", "*.keras", "*.mdl", "*.model"),
    *("*.tfrecord*", "*.hdf5"),
)
#: How many others are named.
_NAMED = 3


@dataclass(slots=True)
class Staging:
    """The folder beside the output."""

    root: Path

    keep: bool = False
    """Leave it when the work fails, for a resumption."""

    @property
    def content(self) -> Path:
        """What becomes the output."""
        return self.root / _CONTENT

    def clear(self) -> None:
        """Remove what an interrupted run has left."""
        for path in self.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
        self.content.mkdir()


def staging_root(out: Path) -> Path:
    """Where the output is made: beside it, whatever its name is written as."""
    whole = out.resolve()
    return whole.with_name(whole.name + SUFFIX)


def has_content(out: Path) -> bool:
    """Whether an interrupted run has left something that may become the output."""
    return (staging_root(out) / _CONTENT).exists()


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
def staged_folder(out: Path, *, force: bool, fresh: bool = True) -> Generator[Staging]:
    """A folder that takes the name `out` once the body is done.

    With `force` an existing `out` lives until the new one is durable, then goes. If the body
    fails, `out` is as it was, and the staging folder is removed unless its `keep` is set.

    Args:
        out: the output.
        force: replace an existing one.
        fresh: begin with an empty folder, without what an interrupted run has left.

    Raises:
        UsageError: `out` exists and `force` is off.
        FileFault: another process is making it.
        OSError: the disk is full or not writable.
    """
    refuse_existing(out, force=force)
    if out.is_symlink() or out.is_file():
        raise UsageError(f"{out}: is not a folder, expected a name for one")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Staging(staging_root(out))
    with _locked(staging.root, out):
        if fresh:
            staging.clear()
        staging.content.mkdir(exist_ok=True)
        try:
            yield staging
            for path in (*staging.content.rglob("*"), staging.content):
                sync(path)
            _replace(staging, out)
        except BaseException:
            if not staging.keep:
                shutil.rmtree(staging.root, ignore_errors=True)
            raise
        shutil.rmtree(staging.root)


def remove_staging(out: Path) -> None:
    """Remove what is left beside a complete output.

    Raises:
        FileFault: another process is at work there.
    """
    root = staging_root(out)
    if root.is_dir():
        with _locked(root, out):
            shutil.rmtree(root)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Never overwrite.

    Raises:
        UsageError: `out` exists and `force` is off.
    """
    if force or not (out.exists() or out.is_symlink()):
        return
    if foreign := _foreign(out):
        more = f" and {len(foreign) - _NAMED} more files" if len(foreign) > _NAMED else ""
        raise UsageError(
            f"{out}: exists already, and holds {', '.join(foreign[:_NAMED])}{more}, which nothing "
            "here has written",
            hint="choose another folder with --out; --force would delete all that is there",
        )
    raise UsageError(
        f"{out}: exists already, and is never overwritten",
        hint="choose another folder with --out, or replace this one with --force",
    )


def _foreign(out: Path) -> list[str]:
    """Files below a folder that this program has not written, by their names alone."""
    if out.is_symlink() or not out.is_dir():
        return []
    files = (p for p in sorted(out.rglob("*")) if p.is_symlink() or not p.is_dir())
    return [
        str(p.relative_to(out))
        for p in files
        if not any(fnmatchcase(p.name, pattern) for pattern in _WRITTEN)
    ]


@contextmanager
def _locked(root: Path, out: Path) -> Generator[None]:
    """The folder, for this process alone; the kernel lets go when the process ends."""
    with suppress(FileExistsError):
        root.mkdir()
    if root.is_symlink() or not root.is_dir():
        raise UsageError(
            f"{root}: is in the way, expected a folder of ours or nothing",
            hint="delete or rename it",
        )
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(root / _LOCK, flags, 0o644), "r+") as lock:
        if holder := hold(lock):
            raise FileFault(
                f"{out}: process {holder} is making it at this moment",
                hint="wait for it, or choose another folder with --out",
            )
        _recover(root, out)
        yield


def _recover(root: Path, out: Path) -> None:
    """Put back what an interrupted replacement had moved away."""
    old = root / _REPLACED
    if old.is_dir() and not out.exists():
        old.rename(out)


def _replace(staging: Staging, out: Path) -> None:
    old = staging.root / _REPLACED
    if out.exists():
        out.rename(old)
    try:
        staging.content.rename(out)
        try:
            sync(out.parent)
        except BaseException:
            out.rename(staging.content)
            raise
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


def sync(path: Path) -> None:
    """Return once a file, or a folder's list of names, is on the device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        e.filename = str(path)  # which the call itself does not know
        raise
    finally:
        os.close(fd)
