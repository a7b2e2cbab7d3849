"""Digests of files, computed in bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

SHA256 = "sha256"
#: Digest by which git, and so the hub, names the content of a file.
GIT = "git"

#: Number of bytes per read.
_PIECE = 4 * 2**20


class FileDigest:
    """Digest of one file, computed while it is iterated over.

    Iterating reads the file and yields the size of each piece in bytes; afterwards `hex` holds the
    digest.

    Args:
        path: file to read.
        kind: `SHA256` or `GIT`.

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
    """Return the digest of a file in hex.

    Args:
        path: file to read.
        kind: `SHA256` or `GIT`.

    Raises:
        OSError: the file cannot be read.
    """
    pieces = FileDigest(path, kind)
    for _ in pieces:
        pass
    return pieces.hex
