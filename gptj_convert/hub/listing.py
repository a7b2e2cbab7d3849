"""What a repository of the hub holds, and what is wanted of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

#: What a repository holds, in the hub's words.
MODEL, DATA_SET = "model", "dataset"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the hub; `digest` is "sha256:…" or "git:…", its blob's name."""

    size: int
    digest: str

    @property
    def kind(self) -> str:
        """Of the digest, as `gptj_convert.files.digest` names it."""
        return self.digest.partition(":")[0]

    @property
    def hex(self) -> str:
        """The digest without its kind."""
        return self.digest.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Listing:
    """One commit's files; `offline` when a finished folder's record stands in for the hub."""

    repository: str
    revision: str | None
    commit: str
    files: dict[str, RemoteFile]
    """Those that are wanted, by their path in the repository."""
    offline: bool = False
    kind: str = MODEL
    others: tuple[str, ...] = ()
    """Paths of all others, so that a choice can be made again without the hub."""
    cached: bool = False
    """Whether the hub's cache on this machine stands in for the hub."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(f.size for f in self.files.values())


@dataclass(frozen=True, slots=True)
class Contents:
    """What a repository holds, for whoever chooses from it."""

    repository: str
    names: Collection[str]
    """Paths of its files, as they are stated: they may lead anywhere."""
    read: Callable[[str, int], bytes]
    """A small file's content, of no more than so many bytes."""


#: Names the files that are wanted.
Choose = Callable[[Contents], Iterable[str]]


def stated_file(size: Any, digest: Any) -> RemoteFile:
    """A file as others state it. The digest becomes part of a name, so its form is checked.

    Raises:
        ValueError: it is not a size and a digest.
    """
    if not isinstance(size, int) or not re.fullmatch(
        "sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", digest
    ):
        raise ValueError
    return RemoteFile(size, digest)
