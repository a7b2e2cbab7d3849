"""Looking at intermediate values of the model while it computes, without a second copy of it.

Layers hand over what an operation gave with `observe`; nothing happens unless somebody looks.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_seen: ContextVar[dict[str, Any] | None] = ContextVar("seen", default=None)

#: What a block hands over, in the order of its computation.
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
    """The value, unchanged; kept if a caller is `observing`."""
    seen = _seen.get()
    if seen is not None:
        seen[operation] = value
    return value


@contextmanager
def observing() -> Generator[dict[str, Any]]:
    """A mapping that is filled with what is observed, by operation, while the context is open.

    Only what runs eagerly is seen: a compiled function hands over nothing that is a value.
    """
    seen: dict[str, Any] = {}
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)
