"""Output folders that appear complete or not at all.

While a command runs, the folder `OUT.partial-gptj` beside `OUT` holds `content`, which becomes
OUT, a lock, and the journal that the command resumes from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gptj_convert.files.file_name import is_license
from gptj_convert.files.lock_file import try_lock
from gptj_model.errors import FileFault, UsageError

SUFFIX = ".partial-gptj"
_CONTENT = "content"
_LOCK = "lock"
_REPLACED = "replaced"
#: Patterns of the file names that this program writes.
_WRITTEN = (
    *(
        "*.json",
        "*.jsonl",
        "*.yaml",
        "*.jinja",
        "merges.txt",
        "vocab.bpe",
        "README.md",
        "checkpoint",
    ),
    *("*.safetensors", "*.bin", "*.pt", "*.ckpt*", "*.h5", "*.keras", "*.mdl", "*.model"),
    *("*.tfrecord*", "*.hdf5"),
    *("saved_model.pb", "fingerprint.pb", "variables.index", "variables.data-*"),
)
#: Number of foreign files that an error names.
_NAMED = 3


@dataclass(slots=True)
class PartialFolder:
    """Folder beside the output, in which the output is made."""

    root: Path

    resumable: bool = False
    """Whether the folder stays when the command fails, so that the command can be resumed."""

    @property
    def content(self) -> Path:
        """Folder that becomes the output."""
        return self.root / _CONTENT

    def clear(self) -> None:
        """Delete what an interrupted run has left, except the lock."""
        for path in self.root.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()
        self.content.mkdir()


def partial_path(out: Path) -> Path:
    """Return the path of the partial folder of an output; links in `out` are resolved."""
    whole = out.resolve()
    return whole.with_name(whole.name + SUFFIX)


def has_partial_content(out: Path) -> bool:
    """Return whether an interrupted run has left content that may become the output."""
    return (partial_path(out) / _CONTENT).exists()


def refuse_overlap(out: Path, source: Path, files: Iterable[Path]) -> None:
    """Refuse an output that lies inside its source or would replace a file of it.

    Links are followed.

    Args:
        out: output folder.
        source: source as the user named it; anything but a folder cannot contain the output.
        files: files that will be read.

    Raises:
        UsageError: output and source overlap.
    """
    hint = "choose a folder beside it with --out"
    real, folder = (Path(os.path.realpath(p)) for p in (out, source))
    if folder.is_dir() and real.is_relative_to(folder):
        place = "is the source itself" if real == folder else f"lies inside the source {source}"
        raise UsageError(f"{out}: {place}", hint=hint)
    for file in files:
        # Both a link and its target are needed.
        places = (Path(os.path.realpath(file)), Path(os.path.realpath(file.parent)))
        if any(place.is_relative_to(real) for place in places):
            raise UsageError(f"{out}: holds the source file {file}", hint=hint)


@contextmanager
def output_folder(out: Path, *, force: bool, fresh: bool = True) -> Generator[PartialFolder]:
    """Yield a partial folder whose content is renamed to `out` once the body has succeeded.

    With `force`, an existing `out` is replaced only when the new one is durable. If the body
    fails, `out` is unchanged, and the partial folder is deleted unless it is `resumable`.

    Args:
        out: output folder.
        force: replace an existing output.
        fresh: delete what an interrupted run has left.

    Raises:
        UsageError: `out` exists and `force` is off, or `out` is not a folder.
        FileFault: another process is writing the same output.
        OSError: the disk is full or not writable.
    """
    refuse_existing(out, force=force)
    if out.is_symlink() or out.is_file():
        raise UsageError(f"{out}: is a file or a link, expected the name of a folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = PartialFolder(partial_path(out))
    with _locked(partial.root, out):
        if fresh:
            partial.clear()
        partial.content.mkdir(exist_ok=True)
        try:
            yield partial
            for path in (*partial.content.rglob("*"), partial.content):
                sync(path)
            _replace(partial, out)
        except BaseException:
            if not partial.resumable:
                shutil.rmtree(partial.root, ignore_errors=True)
            raise
        shutil.rmtree(partial.root)


def remove_partial(out: Path) -> None:
    """Delete the partial folder beside a complete output.

    Raises:
        FileFault: another process is using it.
    """
    root = partial_path(out)
    if root.is_dir():
        with _locked(root, out):
            shutil.rmtree(root)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Refuse to overwrite an existing output.

    Raises:
        UsageError: `out` exists and `force` is off.
    """
    if force or not (out.exists() or out.is_symlink()):
        return
    if foreign := _foreign(out):
        more = f" and {len(foreign) - _NAMED} more files" if len(foreign) > _NAMED else ""
        raise UsageError(
            f"{out}: already exists, and holds {', '.join(foreign[:_NAMED])}{more}, which this "
            "program did not write",
            hint="choose another folder with --out; --force would delete the whole folder",
        )
    raise UsageError(
        f"{out}: already exists",
        hint="choose another folder with --out, or replace this one with --force",
    )


def _foreign(out: Path) -> list[str]:
    """Return the files below a folder whose names are not among those that this program writes."""
    if out.is_symlink() or not out.is_dir():
        return []
    files = (p for p in sorted(out.rglob("*")) if p.is_symlink() or not p.is_dir())
    return [
        str(p.relative_to(out))
        for p in files
        if not (is_license(p.name) or any(fnmatchcase(p.name, x) for x in _WRITTEN))
    ]


@contextmanager
def _locked(root: Path, out: Path) -> Generator[None]:
    """Lock a partial folder; the kernel releases the lock when the process ends."""
    with suppress(FileExistsError):
        root.mkdir()
    if root.is_symlink() or not root.is_dir():
        raise UsageError(
            f"{root}: is not a folder, but its name is needed for unfinished output",
            hint="delete or rename it",
        )
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(root / _LOCK, flags, 0o644), "r+") as lock:
        if holder := try_lock(lock):
            raise FileFault(
                f"{out}: process {holder} is writing it",
                hint="wait for it, or choose another folder with --out",
            )
        _recover(root, out)
        yield


def _recover(root: Path, out: Path) -> None:
    """Restore an old output that an interrupted replacement had moved away."""
    old = root / _REPLACED
    if old.is_dir() and not out.exists():
        old.rename(out)


def _replace(partial: PartialFolder, out: Path) -> None:
    old = partial.root / _REPLACED
    if out.exists():
        out.rename(old)
    try:
        partial.content.rename(out)
        try:
            sync(out.parent)
        except BaseException:
            out.rename(partial.content)
            raise
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        e.filename = str(path)  # fsync itself knows only a descriptor
        raise
    finally:
        os.close(fd)
