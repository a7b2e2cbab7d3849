"""The protocol of executors, which the training loop drives wherever the weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gptj_model.source import TensorSource
from gptj_model.tensors import Scheme, Tensor
from runner.data.reading.input_fn import ALL_ROWS, Batch
from runner.evaluation.evaluate import Evaluator


class StepResult(NamedTuple):
    """Result of one step; nothing was updated if the norm is not finite."""

    loss: float
    """Mean over the batches of each batch's token mean, before the update."""
    norm: float
    """Global norm of the gradients, unscaled and before clipping."""


class Executor(Protocol):
    """Weights, optimizer slots, and the step that changes both.

    Every executor inherits from this class, and so gets the defaults below.
    """

    trained: Sequence[Tensor]
    """Rows that a step updates."""
    saves_every_step: bool = False
    """Whether the state is on disk, so that every step ends with a checkpoint."""
    devices: int = 1
    """Number of devices that compute a step, each as fast as the one that Keras uses by default."""

    def rows(self, batch_size: int) -> slice:
        """Return the rows of every batch that this process computes."""
        return ALL_ROWS

    @property
    def placement(self) -> str | None:
        """Where weights and slots are, in words, if they are divided among devices."""
        return None

    def load(self, source: TensorSource, scheme: Scheme) -> None:
        """Load the weights of a checkpoint whose tensors are those of the table."""
        ...

    def initialize(self) -> None:
        """Initialize the weights at random, as the YAML says."""
        ...

    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        """Load A and B of the trained adapter, by HF name and in HF's layout.

        Raises:
            NotImplementedError: the executor trains no adapter.
        """
        raise NotImplementedError

    def load_state(self, source: TensorSource, step: int) -> str | None:
        """Load what else a checkpoint of this step has: slots, an adapter.

        Returns:
            What is missing there, and therefore starts from scratch; None if nothing is.
        """
        ...

    def step(
        self, group: Sequence[Batch], draw: tuple[int, int], scale: float, rate: float
    ) -> StepResult:
        """Update the weights once, unless the norm is not finite; the update may continue in the
        background.

        Args:
            group: batches whose gradients are averaged.
            draw: seed and counter that the dropout masks start from.
            scale: factor on the loss, for the gradients.
            rate: learning rate.
        """
        ...

    def advance(self) -> None:
        """Count an update that was applied."""
        ...

    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        """Make the checkpoint of a step durable, and return its prefix.

        Args:
            step: step that was completed last.
            state: further scalars of the run, by name.
            stays: whether it is kept after the next checkpoint, as far as keep_checkpoint_max
                allows. One that is not may become durable later, but before the next step's loss is
                known.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints are unchanged. An error
                in the background is raised by the next call.
        """
        ...

    def evaluator(self) -> Evaluator:
        """Return an evaluator of the weights as they are at each evaluation."""
        ...

    def weights(self) -> Mapping[str, Any]:
        """Return the weights by HF name, as values that numpy can convert to arrays."""
        ...

    def close(self) -> None:
        """Close files and threads, if there are any; closing twice is harmless."""
