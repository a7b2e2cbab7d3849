"""Models that are no longer used, with the programs compiled for them, for the next of their shape.

A process that trains several small runs, such as a sweep over learning rates, spends most of its
time on building and compiling the same step. Nothing is kept unless `reuse_programs` asks for it,
because what is kept occupies the memory of a whole run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_kept: deque[tuple[Hashable, Any]] | None = None


@contextmanager
def reuse_programs(limit: int = 1) -> Iterator[None]:
    """Keep the models of runs and commands that end in this context, for later ones of the same
    shape.

    Those on TensorFlow, in this process alone, share them: model, optimizer and precision must be
    the same, learning rates and records may differ.

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


@dataclass(frozen=True)
class Borrowed(Generic[T]):
    """A model that is one user's own until it is given back."""

    shape: Hashable
    model: T

    def give_back(self) -> None:
        """Leave the model to the next user of its shape, if the process keeps any."""
        if _kept is not None:
            _kept.append((self.shape, self.model))


def borrow(shape: Hashable, make: Callable[[], T], reset: Callable[[T], object]) -> Borrowed[T]:
    """Return a model of this shape that another user has left, or a new one.

    Args:
        shape: all that the model and its programs depend on; its class first.
        make: makes a new one.
        reset: makes one that was left as it was when it was new, with NaN as weights: weights that
            are not loaded must not go unnoticed.
    """
    kept = deque() if _kept is None else _kept
    for n, (known, model) in enumerate(kept):
        if known == shape:
            del kept[n]
            reset(model)
            return Borrowed(shape, model)
    return Borrowed(shape, make())
