"""The reference's optimizers, exactly: what one update does to a weight and its slots.

They differ from today's library versions (epsilon outside the bias correction, decay chosen by
variable name, no correction unless asked), so that a run continues as the reference would. What
the reference rounds to float32 is rounded here too: 1 - 0.999 in float32 is 1.3e-5 off.
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

#: Added to rmsprop's mean square; the reference does not read `epsilon` there.
RMSPROP_EPSILON = 1e-10

F32 = np.float32
#: Gradient, slots (sgd: the weight), rate → their new values.
_Rule = Callable[[Any, Sequence[Any], Any], Sequence[Any]]


class UpdateRule:
    """Functions of one weight, or of any part of it: every element is updated by itself.

    Args:
        params: the YAML section.
        ops: what computes: Keras' operations, or numpy, which names them alike.
    """

    def __init__(self, params: OptimizerParams, ops: Any = keras.ops) -> None:
        self._params = params
        self._ops = ops
        self._slots = SLOTS[params.optimizer_type]
        self._rule: _Rule = getattr(self, f"_{params.optimizer_type}")

    def slots(self, tensor: Tensor) -> dict[str, float]:
        """Names of a weight's slots, and what each begins filled with."""
        # The mean square of rmsprop begins at 1, everything else at 0.
        fills = [
            1.0 if self._params.optimizer_type == "rmsprop" and n == 0 else 0.0
            for n in range(len(self._slots))
        ]
        names = (slot_name(tensor.tf, suffix) for suffix in self._slots)
        return dict(zip(names, fills, strict=True))

    @property
    def clips_by_norm(self) -> bool:
        """Whether no weight can be updated before every gradient is known."""
        return bool(self._params.max_gradient_norm)

    def clipped(self, gradient: Any, norm: Any) -> Any:
        """A gradient as the slots take it; `norm` is the global one before clipping."""
        if self._params.max_gradient_norm:
            limit = self._params.max_gradient_norm
            # As TensorFlow rounds it: what is not clipped is multiplied by limit × (1 / limit).
            return gradient * (limit * self._ops.minimum(1 / norm, 1 / F32(limit)))
        if limit := self._params.max_gradient_value:
            return self._ops.clip(gradient, -limit, limit)
        return gradient

    def take(self, gradient: Any, old: Sequence[Any], rate: Any) -> Sequence[Any]:
        """New slots from a clipped gradient and the old ones; of sgd, which has none, the weight
        from the old one."""
        return self._rule(gradient, old, rate)

    def move(self, w: Any, slots: Sequence[Any], rate: Any, correction: Any, decay: float) -> Any:
        """The new weight, by its new slots."""
        return w - self._change(w, slots, rate, correction, decay)

    def decay(self, tensor: Tensor) -> float:
        """By how much a weight decays; only adamw's do."""
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
        """What is taken from a weight, by its new slots."""
        epsilon = self._params.epsilon
        match self._params.optimizer_type:
            case "momentum":
                return rate * slots[0]
            case "rmsprop":
                return slots[1]
            case "adam":
                return rate * correction * slots[0] / (self._ops.sqrt(slots[1]) + epsilon)
        update = slots[0] / (self._ops.sqrt(slots[1]) + epsilon) * correction
        return rate * (update + decay * w if decay else update)


class BetaPowers:
    """The bias correction of adam and adamw, as far as the run has come; none of the others."""

    def __init__(self, params: OptimizerParams) -> None:
        self._params = params
        self._powers = self._after(0)

    def advance(self) -> None:
        """Count an update that was applied."""
        self._powers = {n: power * self._beta(n) for n, power in self._powers.items()}

    def scalars(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds of it."""
        return {name: np.asarray(power) for name, power in self._powers.items()}

    def load(self, source: TensorSource, step: int) -> None:
        """Take the powers from a checkpoint of this step, which may hold none."""
        self._powers = self._after(step)
        for name in self._powers.keys() & source.tensors.keys():
            self._powers[name] = F32(read_tensor(source, name))

    @property
    def correction(self) -> np.float32:
        """What the next update is multiplied by."""
        if not self._powers:
            return F32(1)
        power1, power2 = self._powers[BETA1_POWER], self._powers[BETA2_POWER]
        return np.sqrt(F32(1) - power2) / (F32(1) - power1)

    def _after(self, step: int) -> dict[str, np.float32]:
        """Of both betas, as they stand after so many updates; none without correction."""
        kind = self._params.optimizer_type
        if kind != "adam" and not (kind == "adamw" and self._params.use_bias_correction):
            return {}
        return {n: self._beta(n) ** F32(step + 1) for n in (BETA1_POWER, BETA2_POWER)}

    def _beta(self, power: str) -> np.float32:
        return F32(self._params.beta1 if power == BETA1_POWER else self._params.beta2)
