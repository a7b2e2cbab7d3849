"""Listings of hub repositories, and the choice of files from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

#: Kinds of repositories, in the hub's terms.
MODEL, DATA_SET = "model", "dataset"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """File on the hub."""

    size: int
    """Size in bytes."""
    digest: str
    """Digest as "sha256:HEX", or as "git:HEX" with the name of the git blob."""

    @property
    def kind(self) -> str:
        """Kind of the digest, `SHA256` or `GIT` of `gptj_convert.files.digest`."""
        return self.digest.partition(":")[0]

    @property
    def hex(self) -> str:
        """Digest in hex, without its kind."""
        return self.digest.partition(":")[2]


@dataclass(frozen=True, slots=True)
class Listing:
    """Files of one commit of a repository."""

    repository: str
    revision: str | None
    commit: str
    files: dict[str, RemoteFile]
    """Chosen files, by their paths in the repository."""
    offline: bool = False
    """Whether the listing comes from the download record of a complete folder, not from the hub."""
    kind: str = MODEL
    others: tuple[str, ...] = ()
    """Paths of all other files, so that the choice can be repeated without the hub."""
    cached: bool = False
    """Whether the listing comes from the hub's cache on this machine."""

    @property
    def total(self) -> int:
        """Size of all chosen files together, in bytes."""
        return sum(f.size for f in self.files.values())


@dataclass(frozen=True, slots=True)
class Contents:
    """Content of a repository, from which a `Choose` function chooses files."""

    repository: str
    names: Collection[str]
    """Paths of its files as the hub states them, not checked: they may lead out of a folder."""
    read: Callable[[str, int], bytes]
    """Function that returns the content of a small file, given its path and a limit in bytes."""


#: Function that returns the paths of the chosen files.
Choose = Callable[[Contents], Iterable[str]]


def stated_file(size: Any, digest: Any) -> RemoteFile:
    """Return a file as the hub or a record states it.

    The digest becomes part of a file name, so its form is checked.

    Raises:
        ValueError: size or digest has another form.
    """
    if not isinstance(size, int) or not re.fullmatch(
        "sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", digest
    ):
        raise ValueError
    return RemoteFile(size, digest)
