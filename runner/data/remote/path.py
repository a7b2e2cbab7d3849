"""A path in object storage that is used as a path of the file system, and read as a stream."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from gptj_model.errors import FileFault
from runner.data.remote.address import is_remote
from runner.data.remote.storage import changed, client, faults

#: Number of bytes that are fetched at once; up to two such blocks of a file are in memory.
BLOCK = 8 * 2**20
#: Number of bytes between the block and the reader.
_BUFFER = 2**18


@dataclass(frozen=True, slots=True)
class Stat:
    """Size and identity of an object."""

    st_size: int
    version: str
    """ETag of the object, else its time of change."""


class RemotePath(PurePosixPath):
    """Path of an object or of a prefix, such as s3://bucket/folder/file.

    It has the methods of `pathlib.Path` that readers of sources use. Every method raises FileFault
    for what goes wrong. Size and identity are asked for once; an object that is another one when it
    is opened is an error.
    """

    _known: Stat | None = None

    def __str__(self) -> str:
        """Return the address."""
        protocol, *rest = self.parts
        return f"{protocol}//{'/'.join(rest)}"

    @property
    def key(self) -> str:
        """Bucket and name of the object, as the client takes them."""
        return "/".join(self.parts[1:])

    @property
    def client(self) -> Any:
        """File system that holds the path."""
        return client(self.parts[0].removesuffix(":"))

    def relative_to(self, *other: Any) -> Any:
        """Return the rest of the path below another, as a path without a protocol."""
        return Path(*super().relative_to(*other).parts)

    def stat(self) -> Stat:
        """Return size and identity of the object."""
        if self._known is None:
            with faults(str(self)):
                self._known = stat_of(self.client.info(self.key))
        return self._known

    def is_file(self) -> bool:
        """Return whether an object of this name exists."""
        try:
            with faults(str(self)):
                info = self.client.info(self.key)
            self._known = self._known or stat_of(info)
            return info["type"] == "file"
        except FileFault as fault:
            if fault.message == f"{self}: not found":
                return False
            raise

    def is_dir(self) -> bool:
        """Return whether objects below this name exist."""
        return any(True for _ in self.objects())

    def exists(self) -> bool:
        """Return whether it is an object, or objects are below it."""
        return self.is_file() or self.is_dir()

    def objects(self) -> Iterator[tuple[RemotePath, Stat]]:
        """Yield every object below this name, sorted, with its size and identity."""
        with faults(str(self)):
            listed = self.client.find(self.key, detail=True)
        for key, info in sorted(listed.items()):
            if key != self.key and info["type"] == "file" and not key.endswith("/"):
                path = self.joinpath(*key.split("/")[len(self.parts) - 1 :])
                path._known = stat_of(info)
                yield path, path._known

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open the object for reading; a few blocks of it are in memory at a time."""
        assert mode == "rb", "objects are only read"
        with faults(str(self)):
            raw = self.client.open(self.key, "rb", block_size=BLOCK, cache_type="readahead")
        if self._known and self._known.version != stat_of(raw.details).version:
            raw.close()
            raise changed(str(self))
        return cast(BinaryIO, io.BufferedReader(_Reading(raw, str(self)), _BUFFER))

    def read_bytes(self) -> bytes:
        """Return the whole content."""
        with self.open() as file:
            return file.read()


class _Reading(io.RawIOBase):
    """A file of fsspec whose failures are faults with its address."""

    def __init__(self, file: Any, address: str) -> None:
        self._file = file
        self._address = address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with faults(self._address, begun=True):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def stat_of(info: dict[str, Any]) -> Stat:
    """Return size and identity of an object as a client describes it."""
    version = next(
        (info[k] for k in ("ETag", "etag", "LastModified", "updated") if info.get(k)), ""
    )
    return Stat(int(info["size"] or 0), str(version).strip('"'))


def place(text: str) -> Path:
    """Return a path of the file system, or a `RemotePath` in its place for an address.

    Raises:
        UsageError: it is an address that cannot be read.
    """
    return cast(Path, RemotePath(text)) if is_remote(text) else Path(text)


def as_remote(path: Path) -> RemotePath | None:
    """Return a path that `place` has returned if it is in object storage, else None."""
    found: Any = path
    return found if isinstance(found, RemotePath) else None


def identity(path: Path) -> tuple[int, int | str]:
    """Return the size of a file, and what changes when the file does: time or ETag.

    Raises:
        OSError, FileFault: the file cannot be read.
    """
    if remote := as_remote(path):
        found = remote.stat()
        return found.st_size, found.version
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def files_inside(folder: Path, patterns: Sequence[str]) -> set[Path]:
    """Return the files below a folder whose names match a pattern; objects are listed once."""
    if remote := as_remote(folder):
        found = (path for path, _ in remote.objects())
        return {
            cast(Path, path) for path in found if any(fnmatchcase(path.name, p) for p in patterns)
        }
    return {path for p in patterns for path in folder.rglob(p) if path.is_file()}
