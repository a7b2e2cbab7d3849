"""What long work tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes that are done, of how many, and what is being done."""

    done: int
    total: int
    what: str
