"""What trains: the protocol that a run's loop drives, wherever the weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gptj_model.source import TensorSource
from gptj_model.tensors import Scheme, Tensor
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator


class StepResult(NamedTuple):
    """What one step found; nothing was updated if the norm is not finite."""

    loss: float
    """Mean over the batches of each batch's token mean, before the update."""
    norm: float
    """Global norm of the gradients, unscaled and before clipping."""


class Executor(Protocol):
    """Weights, slots, and the step that changes both."""

    @property
    def trained(self) -> Sequence[Tensor]:
        """Rows of what it updates."""
        ...

    @property
    def saves_every_step(self) -> bool:
        """Whether its state is on the disk, so that every step ends with a checkpoint."""
        ...

    @property
    def devices(self) -> int:
        """How many compute a step, of which each is as fast as the one Keras takes by itself."""
        ...

    @property
    def placement(self) -> str | None:
        """Where weights and slots are, in words, if they are divided."""
        ...

    def load(self, source: TensorSource, scheme: Scheme) -> None:
        """Take the weights of a checkpoint whose tensors are those of the table."""
        ...

    def initialize(self) -> None:
        """Give the weights random values, as the YAML says."""
        ...

    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        """Take A and B of the adapter that is trained, by HF name and in HF's layout."""
        ...

    def load_state(self, source: TensorSource, step: int) -> str | None:
        """Take what else there is in a checkpoint of this step: slots, an adapter.

        Returns:
            What is missing there, and therefore begins anew; None: nothing is.
        """
        ...

    def step(
        self, group: Sequence[Batch], draw: tuple[int, int], scale: float, rate: float
    ) -> StepResult:
        """Update the weights once, or nothing if the norm is not finite; the update may go on
        behind what is done next.

        Args:
            group: the batches whose gradients are averaged.
            draw: seed and counter that the dropout masks begin with.
            scale: what the loss is multiplied by for the gradients.
            rate: of learning.
        """
        ...

    def advance(self) -> None:
        """Count an update that was applied."""
        ...

    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        """Make the checkpoint of a step durable; returns its prefix.

        Args:
            step: the last that was made.
            state: further scalars of the run, by name.
            stays: whether it is kept when the next one is there, as far as keep_checkpoint_max
                allows. One that is not may become durable later, but before the next step's loss
                is known.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are as they were. If it
                shows later, the next call raises it.
        """
        ...

    def evaluator(self) -> Evaluator:
        """The weights as they are at each evaluation."""
        ...

    def weights(self) -> Mapping[str, Any]:
        """By HF name; what becomes an array when it is asked to."""
        ...

    def close(self) -> None:
        """Give back files and threads; closing twice is harmless."""
        ...
