"""What a training run tells while it goes on. The core yields these; the edge draws them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """One update. `loss` is the one before it."""

    step: int
    loss: float
    learning_rate: float
    unclipped_grad_norm: float
    loss_scale: float | None = None
    """The scale after it, where that is dynamic."""
    skipped: int = 0
    """Steps so far that gave no update, because gradients overflowed."""
    resources: Mapping[str, float | None] = field(default_factory=dict)
    """Figures of the time since the last such event: see `runner.training.run.meter`."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Gradients overflowed: nothing was updated, and the loss scale takes note."""

    step: int
    """The last update."""
    loss_scale: float
    """From now on."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is durable."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Metrics of an evaluation."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Warning:
    """Something a person should know."""

    text: str


Event = StepDone | Skipped | Saved | Evaluated | Warning
