"""Digests of files, read piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

SHA256 = "sha256"
#: What git, and so the hub, calls a file's content.
GIT = "git"

_PIECE = 4 * 2**20


class FileDigest:
    """One file's digest. Iterating yields the size of each piece read; afterwards `hex` is it.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, kind: str = SHA256) -> None:
        self._path = path
        self._kind = kind
        self.hex = ""

    def __iter__(self) -> Iterator[int]:
        size = self._path.stat().st_size
        state = hashlib.sha256() if self._kind == SHA256 else hashlib.sha1(b"blob %d\0" % size)
        with self._path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                state.update(piece)
                yield len(piece)
        self.hex = state.hexdigest()


def digest(path: Path, kind: str = SHA256) -> str:
    """A file's digest in hex."""
    pieces = FileDigest(path, kind)
    for _ in pieces:
        pass
    return pieces.hex
