"""Observation of intermediate values while the model computes, without a second copy of it.

Layers pass the result of each operation to `observe`, which does nothing unless a caller is
observing.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_seen: ContextVar[dict[str, Any] | None] = ContextVar("seen", default=None)

#: Operations of a block, in the order of its computation.
OPERATIONS = (
    "ln_1",
    "q_proj",
    "k_proj",
    "v_proj",
    "rotary_q",
    "rotary_k",
    "softmax",
    "attention",
    "out_proj",
    "fc_in",
    "gelu",
    "fc_out",
    "residual",
)


def observe(operation: str, value: T) -> T:
    """Return the value unchanged, and record it if a caller is `observing`."""
    seen = _seen.get()
    if seen is not None:
        seen[operation] = value
    return value


@contextmanager
def observing() -> Generator[dict[str, Any]]:
    """Yield a mapping that receives the value of each operation while the context is open.

    Only eager code is observed: a compiled function passes no values.
    """
    seen: dict[str, Any] = {}
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)
