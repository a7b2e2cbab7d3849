"""A training job as a command line asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import rich_click as click

TRAINING_MODES = ("train", "train_and_eval")
MODES = ("train", "eval", "eval_all", "train_and_eval")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a command line asks for."""

    model_dir: Path
    mode: str
    params_file: Path | None = None
    init_from: Path | None = None
    """Checkpoint whose weights, optimizer state and step the run starts from."""
    adapter: Path | None = None
    """Folder of a peft adapter that the run starts from."""
    checkpoint_path: Path | None = None
    """Checkpoint whose weights alone the run starts from, or that is evaluated."""
    max_steps: int | None = None
    steps: int | None = None
    epochs: float | None = None
    """Number of passes over the training records, counted from the start of the run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    workers: int | None = None
    """Number of processes on this machine that train together; None leaves it to the parameters."""
    only: Literal["validate", "compile"] | None = None
    """Where to stop before the first step."""

    def __post_init__(self) -> None:
        if self.adapter and self.mode not in TRAINING_MODES:
            raise click.UsageError(f"--adapter begins a training, and the mode is {self.mode}")
        if self.only == "compile" and self.mode not in ("train", "eval"):
            raise click.UsageError(f"mode {self.mode} cannot be compiled, expected train or eval")
