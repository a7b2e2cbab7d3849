"""Models of ended runs, with the programs compiled for them, for the next runs of their shape.

A process that trains several small runs, such as a sweep over learning rates, spends most of its
time on building and compiling the same step. Nothing is kept unless `reuse_programs` asks for it,
because what is kept occupies the memory of a whole run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_kept: deque[tuple[str, Any]] | None = None


@contextmanager
def reuse_programs(limit: int = 1) -> Iterator[None]:
    """Keep the models of runs that end in this context, for later runs of the same shape.

    Runs of a resident model on TensorFlow, in this process alone, share them: model, optimizer and
    precision must be the same, learning rates and records may differ.

    Args:
        limit: number of models, with their slots and compiled programs, that are kept; the oldest
            is dropped for another one.
    """
    global _kept
    before, _kept = _kept, deque(maxlen=limit)
    try:
        yield
    finally:
        _kept = before


def take(shape: str) -> Any | None:
    """Return what a run of this shape gave back, which is then no other run's; None if nothing
    is left."""
    kept = deque() if _kept is None else _kept
    for n, (known, model) in enumerate(kept):
        if known == shape:
            del kept[n]
            return model
    return None


def give_back(shape: str, model: Any) -> None:
    """Keep what a run has ended with, if anything is kept."""
    if _kept is not None:
        _kept.append((shape, model))
