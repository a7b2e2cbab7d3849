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
#: Gradient, slots (sgd: the weight), rate → their new values.
_Rule = Callable[[Any, Sequence[Any], Any], Sequence[Any]]


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
        """`take` and `move`, one after the other; returns the norm."""
        norm = self.take(gradients, rate)
        self.move(norm, rate, correction)
        return norm

    def take(self, gradients: Sequence[Any], rate: Any) -> Any:
        """Update the slots by gradients, or nothing if one of them is not finite.

        What has no slots, sgd, moves its weights here. Call it in compiled code.

        Args:
            gradients: float32, in the order of the weights.
            rate: see `arguments`.

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
            variables = self._slots_of[tensor] or [weight]
            old = [tf.convert_to_tensor(v) for v in variables]
            new = self._rule(gradient, old, rate)
            for variable, before, value in zip(variables, old, new, strict=True):
                variable.assign(tf.where(finite, value, before))
        return norm

    def move(self, norm: Any, rate: Any, correction: Any) -> None:
        """Update the weights by the slots that `take` has changed, unless the norm is not finite.

        In a program of its own it needs no copy of what `take` has overwritten: XLA makes one of
        every slot that is read after it was written. Call it in compiled code.

        Args:
            norm: what `take` returned.
            rate: see `arguments`.
            correction: see `arguments`.
        """
        finite = tf.math.is_finite(norm)
        for tensor, weight in self._weights.items():
            if not (slots := self._slots_of[tensor]):
                continue
            decay = 0.0 if self._excluded(tensor) else self._params.weight_decay_rate
            w, *new = (tf.convert_to_tensor(v) for v in (weight, *slots))
            weight.assign(tf.where(finite, w - self._change(w, new, rate, correction, decay), w))

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

    def _sgd(self, g, old, rate):
        return (old[0] - rate * g,)

    def _momentum(self, g, old, rate):
        return (self._params.momentum * old[0] + g,)

    def _rmsprop(self, g, old, rate):
        mean_square, momentum = old
        ms = mean_square + (tf.square(g) - mean_square) * (F32(1) - F32(self._params.rmsprop_decay))
        return ms, self._params.rmsprop_momentum * momentum + rate * g / tf.sqrt(
            ms + RMSPROP_EPSILON
        )

    def _adam(self, g, old, rate):
        m, v = old
        m = m + (g - m) * (F32(1) - F32(self._params.beta1))
        return m, v + (tf.square(g) - v) * (F32(1) - F32(self._params.beta2))

    def _adamw(self, g, old, rate):
        b1, b2 = self._params.beta1, self._params.beta2
        return b1 * old[0] + (1 - b1) * g, b2 * old[1] + (1 - b2) * tf.square(g)

    def _change(self, w, slots, rate, correction, decay: float):
        """What is taken from a weight, by its new slots."""
        epsilon = self._params.epsilon
        match self._params.optimizer_type:
            case "momentum":
                return rate * slots[0]
            case "rmsprop":
                return slots[1]
            case "adam":
                return rate * correction * slots[0] / (tf.sqrt(slots[1]) + epsilon)
        update = slots[0] / (tf.sqrt(slots[1]) + epsilon) * correction
        return rate * (update + decay * w if decay else update)
