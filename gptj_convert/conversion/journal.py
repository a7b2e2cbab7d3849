"""What interrupted work had done: a line about the whole, then one a finished part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Part = TypeVar("Part", bound=DataclassInstance)
else:
    Part = TypeVar("Part")

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor that is written."""

    name: str
    """In the target."""
    source_crc32c: int
    crc32c: int
    nonfinite: int = 0
    """NaN and infinite values of the source; kept as they are."""
    saturated: int = 0
    """Values replaced by the largest that the target's dtype has."""


@dataclass(frozen=True, slots=True)
class Found(Generic[Part]):
    """What a journal holds."""

    job: dict[str, Any]
    parts: list[Part]


class Journal(Generic[Part]):
    """The file, open for more lines.

    Args:
        path: of the file; an existing one is replaced at once by one that says this:
        job: what is to be done.
        parts: what is done already.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], parts: Iterable[Part] = ()) -> None:
        self.job = dict(job)
        self.parts: list[Part] = []
        partial = path.with_name(f"{path.name}.partial")
        self._file = partial.open("wb")
        self._line(job)
        for part in parts:
            self.add(part)
        os.fsync(self._file.fileno())
        partial.replace(path)

    def add(self, part: Part) -> None:
        """Note a part whose bytes are in the output."""
        self.parts.append(part)
        self._line(asdict(part))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _line(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()


def read_journal(path: Path, kind: type[Part]) -> Found[Part] | None:
    """The whole lines of a journal of parts of this kind, a dataclass; checked on resuming.

    None when there is none, or no whole line.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        job = json.loads(lines[0])
        if not lines[0].endswith(b"\n") or not isinstance(job, dict):
            return None
    except (OSError, ValueError, IndexError):
        return None
    parts = []
    for line in lines[1:]:
        try:
            if not line.endswith(b"\n"):
                break  # the line that the interruption cut
            parts.append(kind(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return Found(job, parts)
