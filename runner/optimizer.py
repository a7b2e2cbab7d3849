"""The reference's optimizers, exactly: one update of every weight and its slots.

They differ from today's library versions (epsilon outside the bias correction, decay chosen by
variable name, no correction unless asked), so that a run continues as the reference would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gptj_model.tensors import BETA1_POWER, BETA2_POWER, SLOTS, Tensor, slot_name
from runner.params import OptimizerParams

#: Added to rmsprop's mean square; the reference does not read `epsilon` there.
RMSPROP_EPSILON = 1e-10

_Update = Callable[[Any, Any, Sequence[Any], Any, Any, Any], None]


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
        self._update: _Update = getattr(self, f"_{params.optimizer_type}")
        self.apply = tf.function(self._apply, jit_compile=True)

    def scalars(self, step: int) -> dict[str, np.ndarray]:
        """What a checkpoint after `step` updates holds beside weights and slots."""
        kind = self._params.optimizer_type
        if kind == "adam" or (kind == "adamw" and self._params.use_bias_correction):
            powers = {BETA1_POWER: self._params.beta1, BETA2_POWER: self._params.beta2}
            return {n: np.asarray(beta ** (step + 1), np.float32) for n, beta in powers.items()}
        return {}

    def step_arguments(self, step: int, rate: float) -> tuple[tf.Tensor, tf.Tensor]:
        """Learning rate and bias correction of update `step` (the first is 1), for `apply`."""
        correction = 1.0
        if self._params.optimizer_type == "adam" or self._params.use_bias_correction:
            correction = (1 - self._params.beta2**step) ** 0.5 / (1 - self._params.beta1**step)
        return tf.constant(rate, tf.float32), tf.constant(correction, tf.float32)

    def _apply(self, gradients: Sequence[Any], rate: Any, correction: Any) -> Any:
        """Update everything, in the order of the weights; returns the norm before clipping."""
        norm = tf.linalg.global_norm(gradients)
        if self._params.max_gradient_norm:
            gradients, _ = tf.clip_by_global_norm(
                gradients, self._params.max_gradient_norm, use_norm=norm
            )
        elif self._params.max_gradient_value:
            limit = self._params.max_gradient_value
            gradients = [tf.clip_by_value(g, -limit, limit) for g in gradients]
        for (tensor, weight), gradient in zip(self._weights.items(), gradients, strict=True):
            decay = 0.0 if self._excluded(tensor) else self._params.weight_decay_rate
            self._update(weight, gradient, self._slots_of[tensor], rate, correction, decay)
        return norm

    def _excluded(self, tensor: Tensor) -> bool:
        return any(re.search(p, tensor.tf) for p in self._params.exclude_from_weight_decay)

    def _sgd(self, w, g, slots, rate, correction, decay) -> None:
        w.assign_sub(rate * g)

    def _momentum(self, w, g, slots, rate, correction, decay) -> None:
        (a,) = slots
        w.assign_sub(rate * a.assign(self._params.momentum * a + g))

    def _rmsprop(self, w, g, slots, rate, correction, decay) -> None:
        mean_square, momentum = slots
        d = self._params.rmsprop_decay
        ms = mean_square.assign(d * mean_square + (1 - d) * tf.square(g))
        step = rate * g * tf.math.rsqrt(ms + RMSPROP_EPSILON)
        w.assign_sub(momentum.assign(self._params.rmsprop_momentum * momentum + step))

    def _adam(self, w, g, slots, rate, correction, decay) -> None:
        m, v = self._moments(g, slots)
        w.assign_sub(rate * correction * m / (tf.sqrt(v) + self._params.epsilon))

    def _adamw(self, w, g, slots, rate, correction, decay) -> None:
        m, v = self._moments(g, slots)
        update = m / (tf.sqrt(v) + self._params.epsilon) * correction
        if decay:
            update += decay * w
        w.assign_sub(rate * update)

    def _moments(self, g, slots) -> tuple[Any, Any]:
        m, v = slots
        b1, b2 = self._params.beta1, self._params.beta2
        return m.assign(b1 * m + (1 - b1) * g), v.assign(b2 * v + (1 - b2) * tf.square(g))
