"""Events of a training run. The core yields them; the edge shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """One update. `loss` is the loss before it."""

    step: int
    loss: float
    learning_rate: float
    unclipped_grad_norm: float
    loss_scale: float | None = None
    """Loss scale after the update, where it is dynamic."""
    skipped: int = 0
    """Number of steps so far without an update, because gradients overflowed."""
    resources: Mapping[str, float | None] = field(default_factory=dict)
    """Figures since the last such event; see `runner.training.run.meter`."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A step whose gradients overflowed: nothing was updated, and the loss scale reacts."""

    step: int
    """Last update."""
    loss_scale: float
    """Loss scale from now on."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is durable."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Metrics of an evaluation."""

    step: int
    metrics: dict[str, float]
    is_best: bool = False
    """Whether no earlier evaluation was better."""


@dataclass(frozen=True, slots=True)
class StoppedEarly:
    """The run ends before its target, as early_stopping says."""

    step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Warning:
    """Something that a person should know."""

    text: str


Event = StepDone | Skipped | Saved | Evaluated | StoppedEarly | Warning
