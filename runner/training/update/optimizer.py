"""The update of a model in memory, with its slots as variables beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import Tensor
from runner.config.params import OptimizerParams
from runner.training.update.rule import BetaPowers, UpdateRule


class Optimizer:
    """Slots beside the weights, and the update that changes both.

    Args:
        params: `optimizer` section of the YAML.
        weights: every trainable variable by its row of the table.
    """

    def __init__(self, params: OptimizerParams, weights: Mapping[Tensor, Any]) -> None:
        self._params = params
        self._rule = UpdateRule(params)
        self._powers = BetaPowers(params)
        self._weights = dict(weights)
        self.slots: dict[str, tf.Variable] = {}
        self._slots_of: dict[Tensor, list[tf.Variable]] = {}
        for tensor, weight in self._weights.items():
            found = {
                name: tf.Variable(tf.fill(weight.shape, fill), trainable=False, name="slot")
                for name, fill in self._rule.slots(tensor).items()
            }
            self.slots |= found
            self._slots_of[tensor] = list(found.values())

    @property
    def weights(self) -> dict[Tensor, Any]:
        """Variables that are updated."""
        return self._weights

    def reset(self) -> None:
        """Return to the state before the first update."""
        self._powers = BetaPowers(self._params)
        for tensor, slots in self._slots_of.items():
            for slot, fill in zip(slots, self._rule.slots(tensor).values(), strict=True):
                slot.assign(tf.fill(slot.shape, fill))

    def advance(self) -> None:
        """Count an update that was applied."""
        self._powers.advance()

    def scalars(self) -> dict[str, np.ndarray]:
        """Return what a checkpoint stores beside weights and slots."""
        return self._powers.scalars()

    def load(self, source: TensorSource, step: int) -> bool:
        """Load slots and powers from a checkpoint; return False if it lacks the slots."""
        if any(name not in source.tensors for name in self.slots):
            return False
        for name, variable in self.slots.items():
            variable.assign(read_tensor(source, name).astype(np.float32, copy=False))
        self._powers.load(source, step)
        return True

    def arguments(self, rate: float) -> tuple[tf.Tensor, tf.Tensor]:
        """Return learning rate and bias correction of the next update, for `apply`."""
        return tf.constant(rate, tf.float32), tf.constant(self._powers.correction, tf.float32)

    def apply(self, gradients: Sequence[Any], rate: Any, correction: Any) -> Any:
        """Call `take`, then `move`; return the norm."""
        norm = self.take(gradients, rate)
        self.move(norm, rate, correction)
        return norm

    def take(self, gradients: Sequence[Any], rate: Any) -> Any:
        """Update the slots from gradients, unless one of them is not finite.

        sgd, which has no slots, moves its weights here. Call this in compiled code.

        Args:
            gradients: float32 gradients in the order of the weights.
            rate: learning rate from `arguments`.

        Returns:
            Global norm before clipping, a float32 scalar.
        """
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(norm)
        for (tensor, weight), gradient in zip(self._weights.items(), gradients, strict=True):
            variables = self._slots_of[tensor] or [weight]
            old = [tf.convert_to_tensor(v) for v in variables]
            new = self._rule.take(self._rule.clipped(gradient, norm), old, rate)
            for variable, before, value in zip(variables, old, new, strict=True):
                variable.assign(tf.where(finite, value, before))
        return norm

    def move(self, norm: Any, rate: Any, correction: Any) -> None:
        """Update the weights from the slots that `take` has changed, unless the norm is not finite.

        A separate program needs no copy of what `take` overwrites: XLA copies every slot that is
        read after it is written. Call this in compiled code.

        Args:
            norm: result of `take`.
            rate: learning rate from `arguments`.
            correction: bias correction from `arguments`.
        """
        finite = tf.math.is_finite(norm)
        for tensor, weight in self._weights.items():
            if not (slots := self._slots_of[tensor]):
                continue
            w, *new = (tf.convert_to_tensor(v) for v in (weight, *slots))
            moved = self._rule.move(w, new, rate, correction, self._rule.decay(tensor))
            weight.assign(tf.where(finite, moved, w))
