"""The one protocol of long work: a generator that yields progress and returns its result."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
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


def finish(work: Work[T], report: Callable[[Progress], None] = lambda progress: None) -> T:
    """Run work to its end, and return its result.

    Args:
        work: the work; it is closed whatever happens.
        report: is called with each state of the work.
    """
    with closing(work):
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                return end.value
            report(progress)
