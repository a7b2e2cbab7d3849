"""The reference's optimizers, exactly: one update of every weight and its slots.

They differ from today's library versions (epsilon outside the bias correction, decay chosen by
variable name, no correction unless asked), so that a run continues as the reference would. What
the reference rounds to float32 is rounded here too: 1 - 0.999 in float32 is 1.3e-5 off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import BETA1_POWER, BETA2_POWER, SLOTS, Tensor, slot_name
from runner.params import OptimizerParams

#: Added to rmsprop's mean square; the reference does not read `epsilon` there.
RMSPROP_EPSILON = 1e-10

F32 = np.float32
#: Weight, gradient, slots, rate, bias correction, decay → the new values of weight and slots.
_Rule = Callable[[Any, Any, Sequence[Any], Any, Any, float], Sequence[Any]]


class Optimizer:
    """Slots beside the weights, and the update that changes both.

    Args:
        params: the YAML section.
        weights: every trainable variable with its row of the table.
    """

    def __init__(self, params: OptimizerParams, weights: Mapping[Tensor, Any]) -> None:
        self._params = params
        self._weights = dict(weights)
        self.slots: dict[str, tf.Variable] = {}
        self._slots_of: dict[Tensor, list[tf.Variable]] = {}
        for tensor, weight in self._weights.items():
            variables = []
            for n, suffix in enumerate(SLOTS[params.optimizer_type]):
                # The mean square of rmsprop begins at 1, everything else at 0.
                fill = 1.0 if params.optimizer_type == "rmsprop" and n == 0 else 0.0
                name = slot_name(tensor.tf, suffix)
                variable = tf.Variable(tf.fill(weight.shape, fill), trainable=False, name="slot")
                self.slots[name] = variable
                variables.append(variable)
            self._slots_of[tensor] = variables
        self._rule: _Rule = getattr(self, f"_{params.optimizer_type}")
        self._powers = self._powers_after(0)

    @property
    def weights(self) -> dict[Tensor, Any]:
        """The variables it updates."""
        return self._weights

    def advance(self) -> None:
        """Count an update that was applied."""
        self._powers = {n: power * self._beta(n) for n, power in self._powers.items()}

    def scalars(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds beside weights and slots."""
        return {name: np.asarray(power) for name, power in self._powers.items()}

    def load(self, source: TensorSource, step: int) -> bool:
        """Take slots and powers from a checkpoint; False if it has no such slots."""
        if any(name not in source.tensors for name in self.slots):
            return False
        for name, variable in self.slots.items():
            variable.assign(read_tensor(source, name))
        self._powers = self._powers_after(step)
        for name in self._powers.keys() & source.tensors.keys():
            self._powers[name] = F32(read_tensor(source, name))
        return True

    def arguments(self, rate: float) -> tuple[tf.Tensor, tf.Tensor]:
        """Learning rate and bias correction of the next update, for `apply`."""
        correction = F32(1)
        if self._powers:
            power1, power2 = self._powers[BETA1_POWER], self._powers[BETA2_POWER]
            correction = np.sqrt(F32(1) - power2) / (F32(1) - power1)
        return tf.constant(rate, tf.float32), tf.constant(correction, tf.float32)

    def apply(self, gradients: Sequence[Any], rate: Any, correction: Any) -> Any:
        """Update everything, or nothing if a gradient is not finite.

        Call it in compiled code.

        Args:
            gradients: float32, in the order of the weights.
            rate: see `arguments`.
            correction: see `arguments`.

        Returns:
            The global norm before clipping, a float32 scalar.
        """
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(norm)
        if self._params.max_gradient_norm:
            gradients, _ = tf.clip_by_global_norm(
                gradients, self._params.max_gradient_norm, use_norm=norm
            )
        elif self._params.max_gradient_value:
            limit = self._params.max_gradient_value
            gradients = [tf.clip_by_value(g, -limit, limit) for g in gradients]
        for (tensor, weight), gradient in zip(self._weights.items(), gradients, strict=True):
            decay = 0.0 if self._excluded(tensor) else self._params.weight_decay_rate
            variables = (weight, *self._slots_of[tensor])
            old_w, *old_slots = (tf.convert_to_tensor(v) for v in variables)
            new = self._rule(old_w, gradient, old_slots, rate, correction, decay)
            for variable, old, value in zip(variables, (old_w, *old_slots), new, strict=True):
                variable.assign(tf.where(finite, value, old))
        return norm

    def _excluded(self, tensor: Tensor) -> bool:
        return any(re.search(p, tensor.tf) for p in self._params.exclude_from_weight_decay)

    def _beta(self, power: str) -> np.float32:
        return F32(self._params.beta1 if power == BETA1_POWER else self._params.beta2)

    def _powers_after(self, step: int) -> dict[str, np.float32]:
        """Of both betas, as they stand after so many updates; none without correction."""
        kind = self._params.optimizer_type
        if kind != "adam" and not (kind == "adamw" and self._params.use_bias_correction):
            return {}
        return {n: self._beta(n) ** F32(step + 1) for n in (BETA1_POWER, BETA2_POWER)}

    def _sgd(self, w, g, slots, rate, correction, decay):
        return (w - rate * g,)

    def _momentum(self, w, g, slots, rate, correction, decay):
        a = self._params.momentum * slots[0] + g
        return w - rate * a, a

    def _rmsprop(self, w, g, slots, rate, correction, decay):
        mean_square, momentum = slots
        ms = mean_square + (tf.square(g) - mean_square) * (F32(1) - F32(self._params.rmsprop_decay))
        mom = self._params.rmsprop_momentum * momentum + rate * g / tf.sqrt(ms + RMSPROP_EPSILON)
        return w - mom, ms, mom

    def _adam(self, w, g, slots, rate, correction, decay):
        m, v = slots
        m = m + (g - m) * (F32(1) - F32(self._params.beta1))
        v = v + (tf.square(g) - v) * (F32(1) - F32(self._params.beta2))
        return w - rate * correction * m / (tf.sqrt(v) + self._params.epsilon), m, v

    def _adamw(self, w, g, slots, rate, correction, decay):
        b1, b2 = self._params.beta1, self._params.beta2
        m = b1 * slots[0] + (1 - b1) * g
        v = b2 * slots[1] + (1 - b2) * tf.square(g)
        update = m / (tf.sqrt(v) + self._params.epsilon) * correction
        if decay:
            update += decay * w
        return w - rate * update, m, v
