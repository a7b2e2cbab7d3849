"""The record of interrupted work: one line about the whole, then one per finished part."""

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


@dataclass(frozen=True, slots=True)
class Found(Generic[Part]):
    """Content of a journal."""

    job: dict[str, Any]
    parts: list[Part]


class Journal(Generic[Part]):
    """A journal that is open for more lines.

    Args:
        path: path of the file; an existing file is replaced at once by one with this content.
        job: description of the whole work.
        parts: parts that are already finished.
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
        """Record a part whose bytes are in the output."""
        self.parts.append(part)
        self._line(asdict(part))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _line(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()


def read_journal(path: Path, kind: type[Part]) -> Found[Part] | None:
    """Return the complete lines of a journal whose parts are of this dataclass; they are checked on
    resuming.

    Return None if there is no journal, or it has no complete line.
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
                break  # the line that was cut short
            parts.append(kind(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return Found(job, parts)
