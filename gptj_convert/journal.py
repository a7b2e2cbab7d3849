"""What an interrupted conversion had done: a line about the whole, then one a finished tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


class Journal:
    """The file, open for more lines. What it says is checked again on resuming.

    Args:
        path: of the file.
        job: what is to be done, for a new one.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        found = read_journal(path)
        self.job = found.job if found else dict(job)
        self.moved = found.moved if found else []
        self._file = path.open("ab" if found else "wb")
        if found:
            self._file.truncate(found.end)  # the line that the interruption cut
        else:
            self._line(job)

    def add(self, moved: Moved) -> None:
        """Note a tensor whose bytes are in the file."""
        self.moved.append(moved)
        self._line(asdict(moved))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _line(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()


@dataclass(frozen=True, slots=True)
class Found:
    """What a journal holds."""

    job: dict[str, Any]
    moved: list[Moved]
    end: int
    """Bytes of its whole lines."""


def read_journal(path: Path) -> Found | None:
    """The whole lines of a journal; None when there is none, or no whole line."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        job = json.loads(lines[0])
        if not lines[0].endswith(b"\n") or not isinstance(job, dict):
            return None
    except (OSError, ValueError, IndexError):
        return None
    moved, end = [], len(lines[0])
    for line in lines[1:]:
        try:
            moved.append(Moved(**json.loads(line)))
        except (ValueError, TypeError):
            break
        end += len(line)
    return Found(job, moved, end)
