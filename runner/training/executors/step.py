"""One compiled training step: one program for loss, gradients and slots, one for weights.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from gptj_model.network.model import GPTJ
from runner.data.reading.input_fn import Batch
from runner.evaluation.compiled import program_text
from runner.training.devices.distribution import Workers
from runner.training.executors.executor import StepResult
from runner.training.update.optimizer import Optimizer


class TrainStep:
    """Update of a model by one or several batches.

    Args:
        model: model whose weights the optimizer updates.
        optimizer: slots, and the update rule.
        accumulate: number of batches per update.
        workers: workers that share each batch.
    """

    def __init__(
        self, model: GPTJ, optimizer: Optimizer, accumulate: int, workers: Workers
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._accumulate = accumulate
        self._workers = workers
        self._sums: list[tf.Variable] = []
        if accumulate > 1 or workers.count > 1:
            # One array per weight, whatever the number of batches.
            shapes = [w.shape for w in optimizer.weights.values()]
            self._sums = [tf.Variable(tf.zeros(shape), trainable=False) for shape in shapes]
        # XLA fuses the elementwise operations of softmax, GELU and update, which take most of the
        # time that multiplications leave.
        self._whole = tf.function(self._run_whole, jit_compile=True, autograph=False)
        self._add = tf.function(self._run_add, jit_compile=True, autograph=False)
        self._take = tf.function(self._run_take, jit_compile=True, autograph=False)
        self._move = tf.function(optimizer.move, jit_compile=True, autograph=False)

    def __call__(self, group: Sequence[Batch], scale: float, rate: float) -> StepResult:
        """Update the weights once; the optimizer counts the update only if the norm is finite.

        Args:
            group: as many batches as are accumulated, each with this worker's share.
            scale: factor on the loss, for the gradients.
            rate: learning rate.
        """
        factor = tf.constant(scale, tf.float32)
        learning_rate, correction = self._optimizer.arguments(rate)
        if not self._sums:
            loss, norm = self._whole(*group[0], factor, learning_rate)
            loss = float(loss)
        else:
            losses = []
            for n, (batch, share) in enumerate(zip(group, self._shares(group), strict=True)):
                weight = tf.constant(share, tf.float32)
                losses.append(share * float(self._add(*batch, factor, weight, tf.constant(n == 0))))
            loss = float(self._workers.total([sum(losses) / len(group)])[0])
            self._workers.add_up(self._sums)
            norm = self._take(learning_rate)
        self._move(norm, learning_rate, correction)
        return StepResult(loss, float(norm))

    def compiled(self, batch: Batch) -> str:
        """Return the compiled program of one batch as text; nothing runs."""
        one = tf.constant(1.0)
        if not self._sums:
            return program_text(self._whole, *batch, one, one)
        return program_text(self._add, *batch, one, one, tf.constant(True))

    def _shares(self, group: Sequence[Batch]) -> list[float]:
        """Return this worker's share of the tokens that count, for each batch."""
        if self._workers.count == 1:
            return [1.0] * len(group)
        counts = [float(np.sum(1.0 - ignored_BT, dtype=np.float64)) for _, ignored_BT, _ in group]
        totals = self._workers.total(counts)
        return [count / max(total, 1.0) for count, total in zip(counts, totals, strict=True)]

    def _run_whole(self, ids_BT, ignored_BT, labels_BT, scale, rate):
        loss, gradients = self._gradients(ids_BT, ignored_BT, labels_BT, scale)
        return loss, self._optimizer.take(gradients, rate)

    def _run_add(self, ids_BT, ignored_BT, labels_BT, scale, share, is_first):
        loss, gradients = self._gradients(ids_BT, ignored_BT, labels_BT, scale, share)
        for total, gradient in zip(self._sums, gradients, strict=True):
            total.assign(tf.where(is_first, gradient, total + gradient))
        return loss

    def _run_take(self, rate):
        return self._optimizer.take([s.value() for s in self._sums], rate)

    def _gradients(self, ids_BT, ignored_BT, labels_BT, scale, share=1.0):
        """Return the loss, and its contribution to the update's gradients in float32, unscaled."""
        weights = [w.value for w in self._optimizer.weights.values()]
        with tf.GradientTape() as tape:
            loss = self._model.token_loss(ids_BT, labels_BT, ignored_BT, training=True).mean
            scaled = loss * (scale * share / self._accumulate)
        masks = self._model.seeds.state
        drawn = tf.identity(masks.value)
        gradients = tape.gradient(scaled, weights)
        # A recomputed block resets the generator to its own masks, where the next batch must not
        # start.
        masks.assign(drawn)
        # The embedding's gradient comes as rows; the norm is that of the whole matrix.
        dense = [tf.convert_to_tensor(g) for g in gradients]
        return loss, [tf.cast(g, tf.float32) * (1 / scale) for g in dense]
