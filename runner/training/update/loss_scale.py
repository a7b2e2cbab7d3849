"""Loss scales, which keep small gradients representable in 16 bits.

The three kinds of the reference. A dynamic scale is state of the run: it is saved and restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from gptj_model.dtypes import largest
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import (
    CURRENT_LOSS_SCALE,
    GOOD_STEPS,
    OVERFLOWS_SINCE_RESCALE,
    STEPS_SINCE_RESCALE,
)
from runner.config.params import OptimizerParams


class LossScale(Protocol):
    """A loss scale, and how it reacts to gradients that are finite or not."""

    value: float

    @property
    def is_dynamic(self) -> bool:
        """Whether steps with overflowing gradients are skipped instead of being an error."""
        ...

    @property
    def at_floor(self) -> bool:
        """Whether the scale cannot fall any further."""
        ...

    def update(self, finite: bool) -> None:
        """React to the gradients of a step."""
        ...

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the state under the names of the reference's variables."""
        ...

    def load(self, source: TensorSource) -> None:
        """Load the state from a checkpoint; what is missing stays as it is."""
        ...


def loss_scale(params: OptimizerParams) -> LossScale:
    """Return the loss scale that the YAML asks for."""
    match params.loss_scaling_factor:
        case "dynamic":
            return TolerantScale(params)
        case "tf_dynamic":
            return StrictScale(params)
        case number:
            return FixedScale(number)


class FixedScale:
    """A constant scale."""

    is_dynamic = False
    at_floor = True

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, finite: bool) -> None:
        """Do nothing."""

    def tensors(self) -> dict[str, np.ndarray]:
        """Return no state."""
        return {}

    def load(self, source: TensorSource) -> None:
        """Do nothing."""


class _DynamicScale:
    is_dynamic = True
    floor: float

    def __init__(self, params: OptimizerParams) -> None:
        self.value = params.initial_loss_scale
        self._period = params.steps_per_increase
        self._counters: dict[str, int] = {GOOD_STEPS: 0}

    @property
    def at_floor(self) -> bool:
        return self.value <= self.floor

    def tensors(self) -> dict[str, np.ndarray]:
        counters = {name: np.asarray(n, np.int64) for name, n in self._counters.items()}
        return {CURRENT_LOSS_SCALE: np.asarray(self.value, np.float32), **counters}

    def load(self, source: TensorSource) -> None:
        stored: Mapping[str, float] = {
            name: read_tensor(source, name).item()
            for name in (CURRENT_LOSS_SCALE, *self._counters)
            if name in source.tensors
        }
        self.value = float(stored.get(CURRENT_LOSS_SCALE, self.value))
        self._counters = {n: int(stored.get(n, old)) for n, old in self._counters.items()}


class TolerantScale(_DynamicScale):
    """`dynamic`: halves when more than a share of the steps since its last change overflowed,
    doubles after a number of steps since then, within bounds."""

    def __init__(self, params: OptimizerParams) -> None:
        super().__init__(params)
        self.floor = params.min_loss_scale
        self._ceiling = params.max_loss_scale
        self._tolerance = np.float32(params.overflow_tolerance)
        self._counters |= {STEPS_SINCE_RESCALE: 0, OVERFLOWS_SINCE_RESCALE: 0}

    def update(self, finite: bool) -> None:
        """React to the gradients of a step."""
        steps = self._counters[STEPS_SINCE_RESCALE] + 1
        overflows = self._counters[OVERFLOWS_SINCE_RESCALE] + (not finite)
        if np.float32(overflows) / np.float32(steps) > self._tolerance:
            self.value /= 2
            steps = overflows = 0
        elif steps >= self._period:
            self.value *= 2
            steps = overflows = 0
        self.value = min(max(self.value, self.floor), self._ceiling)
        self._counters |= {STEPS_SINCE_RESCALE: steps, OVERFLOWS_SINCE_RESCALE: overflows}


class StrictScale(_DynamicScale):
    """`tf_dynamic`, TensorFlow's own: halves at every overflow, down to 1, and doubles after a
    number of steps without one."""

    floor = 1.0

    def update(self, finite: bool) -> None:
        """React to the gradients of a step."""
        good = self._counters[GOOD_STEPS] + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, self.floor)
        elif good >= self._period:
            if self.value * 2 <= largest("float32"):
                self.value *= 2
            good = 0
        self._counters[GOOD_STEPS] = good
