"""Progress of long operations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of an operation, in bytes or stages."""

    done: int
    total: int
    what: str
    """Item that is being processed, in words for people."""
