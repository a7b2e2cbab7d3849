"""A document of a source file, and what can be wrong with one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from runner.data.making.long_line import Damaged

#: Size in bytes from which a document is read in pieces, and the size of a piece.
LONG = 8 * 2**20
PIECE = 2**19


class Form(Enum):
    """Encoding of a document's bytes."""

    JSON = "an object"
    TEXT = "UTF-8"
    EXAMPLE = "a tf.train.Example"


@dataclass(frozen=True, slots=True)
class Raw:
    """A document, or a piece of one."""

    data: bytes
    form: Form
    path: str
    place: int
    """Line of the document, from 1; or number of its record or row, from 0."""
    more: bool = False
    """Whether the document continues in the next item."""
    after: int = 0
    """Number of bytes of the file before the line that `place` counts from."""

    @property
    def where(self) -> str:
        """Place of the document, as error messages show it."""
        return where(self.path, self.place, self.after)


@dataclass(frozen=True, slots=True)
class Problem:
    """A document that cannot be used."""

    where: str
    what: str
    hint: str | None = None
    """Command or option that helps, if one is known."""
    reason: str | None = None
    """Name of the rule that a sound document breaks; None for a malformed document."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How documents are read from files."""

    columns: tuple[str, ...] = ("text",)
    """Columns to read from a JSON object or a row of a table. Each entry may list alternatives
    separated by `|`, as in `highlights|summary`, of which the first that exists is read."""
    rows: bool = False
    """Read all columns of a table, each row as a JSON object; `columns` has no effect."""
    whole_files: bool = False
    """Read every file as one document; only compression is inferred from its name."""
    spool: Path
    """Folder for documents that are too long for memory."""


def where(path: Path | str, line: int, after: int = 0) -> str:
    """Return a place as error messages show it.

    Args:
        path: path of the file.
        line: line, from 1, or number of a record or row, from 0.
        after: number of bytes before the line that `line` counts from. Their lines are counted
            here, so that only a run with an error reads them.

    Raises:
        OSError: the file cannot be read.
    """
    return f"{path}:{line + (_lines(str(path), after) if after else 0)}"


@lru_cache(maxsize=16)
def _lines(path: str, size: int) -> int:
    """Return the number of line breaks in the first `size` bytes of a file."""
    count = 0
    with Path(path).open("rb") as file:
        while size and (block := file.read(min(size, PIECE))):
            count += block.count(b"\n")
            size -= len(block)
    return count


def damage(path: Path, damaged: Damaged) -> Problem:
    """Return damage near the beginning of a file as a problem with its line."""
    return Problem(f"{path}:{damaged.line + 1}", str(damaged), damaged.hint)


def too_long(path: Path, place: int, after: int = 0) -> Problem:
    """Return the problem of a document that is too long to be read as a whole; see `where`."""
    return Problem(where(path, place, after), f"has more than {LONG} bytes")


def not_utf8(error: UnicodeDecodeError) -> str:
    """Describe the byte that is not UTF-8."""
    return f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8"


def pick(values: Mapping[str, Any], group: str) -> Any:
    """Return the value of the first name of a group that exists.

    Raises:
        KeyError: none of the names exists; its argument lists them for people.
    """
    for name in group.split("|"):
        if name in values:
            return values[name]
    raise KeyError(group.replace("|", " or "))
