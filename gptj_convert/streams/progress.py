"""The one protocol of long work: a generator that yields progress and returns its result."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a piece of work, in bytes or in whatever unit it counts."""

    done: int
    total: int
    what: str
    """Name of the item in work, such as a tensor or a file."""


#: Long work. Nothing happens before the first item is asked for; closing it stops the work and
#: gives back what it holds.
Work = Generator[Progress, None, T]


def finish(work: Work[T]) -> T:
    """Run work to its end without showing progress, and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
