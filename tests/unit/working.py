"""Work that is run to its end, with all progress that it reports."""

from __future__ import annotations

from typing import TypeVar

from gptj_convert.streams.progress import Progress, Work

T = TypeVar("T")


def drain(work: Work[T]) -> tuple[list[Progress], T]:
    """Return all progress, and the result."""
    told: list[Progress] = []
    while True:
        try:
            told.append(next(work))
        except StopIteration as end:
            return told, end.value
