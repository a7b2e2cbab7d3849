"""The reference's optimizers, exactly: the effect of one update on a weight and its slots.

They differ from today's library versions (epsilon outside the bias correction, decay chosen by
variable name, no correction unless asked), so that a run resumes as the reference would. What the
reference rounds to float32 is rounded here too: 1 - 0.999 in float32 is off by 1.3e-5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import BETA1_POWER, BETA2_POWER, SLOTS, Tensor, slot_name
from runner.config.params import OptimizerParams

#: Constant added to rmsprop's mean square, where the reference does not read `epsilon`.
RMSPROP_EPSILON = 1e-10

F32 = np.float32
#: From gradient, slots (of sgd the weight) and rate to the new slots.
_Rule = Callable[[Any, Sequence[Any], Any], Sequence[Any]]


class UpdateRule:
    """Functions of one weight or of any part of it: every element is updated independently.

    Args:
        params: `optimizer` section of the YAML.
        ops: Keras' operations, or numpy, which has the same names.
    """

    def __init__(self, params: OptimizerParams, ops: Any = keras.ops) -> None:
        self._params = params
        self._ops = ops
        self._slots = SLOTS[params.optimizer_type]
        self._rule: _Rule = getattr(self, f"_{params.optimizer_type}")

    def slots(self, tensor: Tensor) -> dict[str, float]:
        """Return the names of a weight's slots, and the value that each is filled with at the
        start."""
        # The mean square of rmsprop starts at 1, everything else at 0.
        fills = [
            1.0 if self._params.optimizer_type == "rmsprop" and n == 0 else 0.0
            for n in range(len(self._slots))
        ]
        names = (slot_name(tensor.tf, suffix) for suffix in self._slots)
        return dict(zip(names, fills, strict=True))

    @property
    def clips_by_norm(self) -> bool:
        """Whether every gradient must be known before any weight can be updated."""
        return bool(self._params.max_gradient_norm)

    def clipped(self, gradient: Any, norm: Any) -> Any:
        """Return a gradient as the slots take it; `norm` is the global norm before clipping."""
        if self._params.max_gradient_norm:
            limit = self._params.max_gradient_norm
            # Rounded as in TensorFlow: an unclipped gradient is multiplied by limit × (1 / limit).
            return gradient * (limit * self._ops.minimum(1 / norm, 1 / F32(limit)))
        if limit := self._params.max_gradient_value:
            return self._ops.clip(gradient, -limit, limit)
        return gradient

    def take(self, gradient: Any, old: Sequence[Any], rate: Any) -> Sequence[Any]:
        """Return the new slots from a clipped gradient and the old slots; for sgd, which has none,
        the new weight from the old one."""
        return self._rule(gradient, old, rate)

    def move(self, w: Any, slots: Sequence[Any], rate: Any, correction: Any, decay: float) -> Any:
        """Return the new weight from its new slots."""
        return w - self._change(w, slots, rate, correction, decay)

    def decay(self, tensor: Tensor) -> float:
        """Return the weight decay of a tensor; only adamw has one."""
        patterns = self._params.exclude_from_weight_decay
        excluded = any(re.search(p, tensor.tf) for p in patterns)
        return 0.0 if excluded else self._params.weight_decay_rate

    def _sgd(self, g, old, rate):
        return (old[0] - rate * g,)

    def _momentum(self, g, old, rate):
        return (self._params.momentum * old[0] + g,)

    def _rmsprop(self, g, old, rate):
        mean_square, momentum = old
        ms = mean_square + (self._ops.square(g) - mean_square) * (
            F32(1) - F32(self._params.rmsprop_decay)
        )
        return ms, self._params.rmsprop_momentum * momentum + rate * g / self._ops.sqrt(
            ms + RMSPROP_EPSILON
        )

    def _adam(self, g, old, rate):
        m, v = old
        m = m + (g - m) * (F32(1) - F32(self._params.beta1))
        return m, v + (self._ops.square(g) - v) * (F32(1) - F32(self._params.beta2))

    def _adamw(self, g, old, rate):
        b1, b2 = self._params.beta1, self._params.beta2
        return b1 * old[0] + (1 - b1) * g, b2 * old[1] + (1 - b2) * self._ops.square(g)

    def _change(self, w, slots, rate, correction, decay: float):
        """Return what is subtracted from a weight, from its new slots."""
        epsilon = self._params.epsilon
        match self._params.optimizer_type:
            case "momentum":
                return rate * slots[0]
            case "rmsprop":
                return slots[1]
            case "adam":
                return rate * correction * slots[0] / (self._ops.sqrt(slots[1]) + epsilon)
        update = slots[0] / (self._ops.sqrt(slots[1]) + epsilon) * correction
        # A decay that a compiled loop looks up may be 0 all the same.
        return rate * (update + decay * w if not isinstance(decay, float) or decay else update)


class BetaPowers:
    """Bias correction of adam and adamw at the current step; other optimizers have none."""

    def __init__(self, params: OptimizerParams) -> None:
        self._params = params
        self._powers = self._after(0)

    def advance(self) -> None:
        """Count an update that was applied."""
        self._powers = {n: power * self._beta(n) for n, power in self._powers.items()}

    def scalars(self) -> dict[str, np.ndarray]:
        """Return the scalars that a checkpoint stores."""
        return {name: np.asarray(power) for name, power in self._powers.items()}

    def load(self, source: TensorSource, step: int) -> None:
        """Load the powers from a checkpoint of this step, which may have none."""
        self._powers = self._after(step)
        for name in self._powers.keys() & source.tensors.keys():
            self._powers[name] = F32(read_tensor(source, name))

    @property
    def correction(self) -> np.float32:
        """Factor of the next update."""
        if not self._powers:
            return F32(1)
        power1, power2 = self._powers[BETA1_POWER], self._powers[BETA2_POWER]
        return np.sqrt(F32(1) - power2) / (F32(1) - power1)

    def _after(self, step: int) -> dict[str, np.float32]:
        """Return both powers after `step` updates; none without correction."""
        kind = self._params.optimizer_type
        if kind != "adam" and not (kind == "adamw" and self._params.use_bias_correction):
            return {}
        return {n: self._beta(n) ** F32(step + 1) for n in (BETA1_POWER, BETA2_POWER)}

    def _beta(self, power: str) -> np.float32:
        return F32(self._params.beta1 if power == BETA1_POWER else self._params.beta2)
