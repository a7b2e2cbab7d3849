"""The update of stacked weights from their gradients, as a function that JAX compiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gptj_model.network.device_arrays import DeviceArrays
from gptj_model.network.stacked import Weights
from gptj_model.tensors import Tensor
from runner.training.update.jax_rounding import rounded
from runner.training.update.rule import UpdateRule


class StackedUpdate:
    """Update of every trained row; nothing changes if the norm of the gradients is not finite.

    Gradients and slots of 16 bits are widened to float32 row by row: a wide copy of a whole stack
    would take as much memory as the weights. What is wide already is updated at once: on a
    processor a loop over the rows takes three times as long.

    Args:
        rule: rule of the update, for jax.numpy.
        arrays: weights whose stacks have a trained row.
        trained: trained rows.
    """

    def __init__(self, rule: UpdateRule, arrays: DeviceArrays, trained: Iterable[Tensor]) -> None:
        self._rule = rule
        self._arrays = arrays
        self._trained = set(trained)

    def __call__(
        self,
        weights: Weights,
        slots: Sequence[Weights],
        gradients: Weights,
        scale: Any,
        rate: Any,
        correction: Any,
        key: Any,
    ) -> tuple[Weights, Sequence[Weights], Any]:
        """Return the new weights and slots, and the global norm before clipping. Traced, not run.

        Args:
            weights: float32 weights by stack.
            slots: every kind of slot by stack, as stored.
            gradients: gradients of the loss times `scale`, of any float dtype.
            scale: factor on the loss.
            rate: learning rate.
            correction: bias correction.
            key: seed of the rounding, uint32 (2,).
        """
        unscale = 1 / scale
        norm = jnp.sqrt(sum(self._squares(name, g, unscale) for name, g in gradients.items()))
        for n, name in enumerate(weights):
            update = _RowUpdate(self._rule, norm, unscale, rate, correction)
            old = weights[name], [arrays[name] for arrays in slots]
            of_stack = jax.random.fold_in(key, n)
            weights[name], new = self._updated(name, update, old, gradients[name], of_stack)
            for arrays, values in zip(slots, new, strict=True):
                arrays[name] = values
        return weights, slots, norm

    def _squares(self, name: str, gradient: Any, unscale: Any) -> Any:
        """Return the sum of the squares of a stack's gradient, without the rows that are frozen."""
        if not self._arrays.is_stacked(name):
            return jnp.sum(jnp.square(gradient.astype(jnp.float32) * unscale))
        trained = self._arrays.by_row(name, self._trained.__contains__)

        def add(row: Any, total: Any) -> Any:
            squares = jnp.square(_row(gradient, row).astype(jnp.float32) * unscale)
            return total + jnp.where(trained[row], jnp.sum(squares), 0.0)

        return jax.lax.fori_loop(0, len(trained), add, jnp.float32(0))

    def _updated(self, name: str, update: _RowUpdate, old: Any, gradient: Any, key: Any) -> Any:
        """Return the new weight and the new slots of a stack."""
        decays = self._arrays.by_row(name, self._rule.decay)
        if not self._arrays.is_stacked(name):
            weight, slots = old
            return update(weight, slots, gradient, decays[0], key)
        trained = self._arrays.by_row(name, self._trained.__contains__)
        weight, slots = old
        if all(values.dtype == jnp.float32 for values in (gradient, *slots)):
            column = (-1, *(1,) * (weight.ndim - 1))
            of_rows = decays.reshape(column), key, trained.reshape(column)
            return update(weight, slots, gradient, *of_rows)

        def step(row: Any, carry: Any) -> Any:
            weight, slots = carry
            new = update(
                weight[row],
                [_row(values, row) for values in slots],
                _row(gradient, row),
                decays[row],
                jax.random.fold_in(key, row),
                applies=trained[row],
            )
            return jax.tree.map(lambda a, b: a.at[row].set(b), carry, new)

        return jax.lax.fori_loop(0, len(trained), step, old)


def _row(stack: Any, row: Any) -> Any:
    # The barrier keeps XLA from widening the whole stack before it takes the row.
    return jax.lax.optimization_barrier(stack[row])


class _RowUpdate:
    """Update of any weight or part of one.

    Args:
        rule: rule of the update.
        norm: global norm of the gradients.
        unscale: factor on every gradient.
        rate: learning rate.
        correction: bias correction.
    """

    def __init__(
        self, rule: UpdateRule, norm: Any, unscale: Any, rate: Any, correction: Any
    ) -> None:
        self._rule = rule
        self._norm = norm
        self._unscale = unscale
        self._rate = rate
        self._correction = correction

    def __call__(
        self, w: Any, stored: list[Any], gradient: Any, decay: Any, key: Any, applies: Any = True
    ) -> tuple[Any, list[Any]]:
        """Return the new weight and the new slots.

        Args:
            w: weight.
            stored: slots as they are stored.
            gradient: gradient of the scaled loss.
            decay: weight decay.
            key: seed of the rounding.
            applies: whether the weight is trained.
        """
        applies = applies & jnp.isfinite(self._norm)
        old = [values.astype(jnp.float32) for values in stored]
        gradient = self._rule.clipped(gradient.astype(jnp.float32) * self._unscale, self._norm)
        new = self._rule.take(gradient, old or [w], self._rate)
        if not stored:
            return jnp.where(applies, new[0], w), []
        slots = [
            jnp.where(applies, rounded(values, before.dtype, jax.random.fold_in(key, n)), before)
            for n, (values, before) in enumerate(zip(new, stored, strict=True))
        ]
        if all(values.dtype == jnp.float32 for values in slots):
            # Else XLA would compute them a second time for the weight, from a copy of the old ones,
            # which it has overwritten.
            new = slots = jax.lax.optimization_barrier(slots)
        moved = self._rule.move(w, new, self._rate, self._correction, decay)
        return jnp.where(applies, moved, w), slots
