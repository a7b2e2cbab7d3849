"""Evaluation over records: the reference's metrics under its names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import tensorflow as tf

from gptj_model.errors import DataFault
from gptj_model.model import GPTJ
from runner.data.input_fn import Batch
from runner.step import program_text

LOSS = "loss"
ACCURACY = "eval/accuracy"
PERPLEXITY = "eval/lm_perplexity"
BITS_PER_BYTE = "eval/bits_per_byte"


class Evaluator:
    """Metrics of a model, compiled once."""

    def __init__(self, model: GPTJ) -> None:
        @tf.function(jit_compile=True)
        def run(ids_BT, ignored_BT, labels_BT):
            return model.token_loss(ids_BT, labels_BT, ignored_BT)

        self._run = run

    def compiled(self, batch: Batch) -> str:
        """The compiled program of one batch, as text; nothing is run."""
        return program_text(self._run, *batch)

    def __call__(
        self,
        batches: Iterable[Batch],
        *,
        tokens_per_byte: float,
        limit: int = 0,
        report: Callable[[int], None] = lambda n: None,
    ) -> dict[str, float]:
        """Metrics over batches.

        `loss` is the mean over the batches of each batch's token mean; the others weigh every
        token alike.

        Args:
            batches: what to evaluate on.
            tokens_per_byte: for bits per byte.
            limit: number of batches; 0 means all.
            report: is told how many are done.

        Raises:
            DataFault: no token counts.
        """
        total = count = correct = means = 0.0
        n = 0
        for n, batch in enumerate(batches, start=1):
            sums = self._run(*batch)
            total += float(sums.total)
            count += float(sums.count)
            correct += float(sums.correct)
            means += float(sums.mean)
            report(n)
            if n == limit:
                break
        if not count:
            raise DataFault("every token of the evaluation records is masked")
        mean = total / count
        return {
            LOSS: means / n,
            ACCURACY: correct / count,
            PERPLEXITY: math.exp(mean) if mean < 700 else math.inf,
            BITS_PER_BYTE: mean / math.log(2) * tokens_per_byte,
        }
