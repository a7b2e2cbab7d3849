"""Evaluate a model on records with the metrics of the reference, under its names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from gptj_model.errors import DataFault
from gptj_model.network.loss import TokenLoss
from gptj_model.streaming.forward import StreamedModel, normed_states
from runner.config.eval_metric import EvalMetric
from runner.data.reading.input_fn import Batch

#: Default size in bytes of the hidden states that share one pass over the weights.
STATES = 2**28


class Evaluator(Protocol):
    """Computes the losses of a model."""

    def losses(self, batches: Iterable[Batch]) -> Iterator[TokenLoss]:
        """Yield the sums over each batch, in order."""
        ...


class StreamedEvaluator:
    """Evaluates a model that is read block by block, once per group of batches.

    Args:
        model: function that returns the model in its state at an evaluation.
        memory: largest size in bytes of the hidden states of a group.
    """

    def __init__(self, model: Callable[[], StreamedModel], *, memory: int = STATES) -> None:
        self._model = model
        self._memory = memory

    def losses(self, batches: Iterable[Batch]) -> Iterator[TokenLoss]:
        """See `Evaluator`."""
        model, left = self._model(), iter(batches)
        while group := self._group(left, model.config.n_embd):
            yield from _pass(model, group)

    def _group(self, batches: Iterator[Batch], width: int) -> list[Batch]:
        """Return the next batches whose hidden states fit, at least one if any is left."""
        found: list[Batch] = []
        room, size = self._memory, 0
        while room >= size and (batch := next(batches, None)) is not None:
            found.append(batch)
            size = 4 * batch[0].size * width
            room -= size
        return found


def _pass(model: StreamedModel, group: Sequence[Batch]) -> list[TokenLoss]:
    """Return the losses of batches that share one pass over the weights."""
    head, states = normed_states(model, [np.asarray(ids_BT) for ids_BT, _, _ in group])
    return head.losses(states, [batch[1:] for batch in group])


def evaluate(
    evaluator: Evaluator,
    batches: Iterable[Batch],
    *,
    tokens_per_byte: float,
    limit: int = 0,
    report: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """Return the metrics over batches.

    `loss` is the mean over batches of the mean over tokens; the other metrics weigh all tokens
    equally.

    Args:
        evaluator: model to evaluate.
        batches: batches of records.
        tokens_per_byte: factor from bits per token to bits per byte.
        limit: number of batches; 0 means all.
        report: called with the number of batches done.

    Raises:
        DataFault: the mask excludes every token.
    """
    found = add_up(evaluator, islice(batches, limit or None), report)
    if not found.count:
        raise DataFault("every token of the evaluation records is masked")
    return found.metrics(
        loss=found.means / found.batches,
        bits_per_byte=found.mean / math.log(2) * tokens_per_byte,
    )


@dataclass(slots=True)
class Sums:
    """Sums over all batches."""

    total: float = 0.0
    """Sum of the cross-entropies of the counted tokens, in nats."""
    count: float = 0.0
    """Number of counted tokens."""
    correct: float = 0.0
    """Number of counted tokens that the model predicted."""
    means: float = 0.0
    """Sum of the batches' means over tokens."""
    batches: int = 0

    @property
    def mean(self) -> float:
        """Mean cross-entropy of the counted tokens, in nats."""
        return self.total / self.count

    def metrics(self, *, loss: float, bits_per_byte: float) -> dict[str, float]:
        """Return the metrics by name; the kind of evaluation determines the two arguments."""
        return {
            EvalMetric.LOSS.value: loss,
            EvalMetric.ACCURACY.value: self.correct / self.count,
            EvalMetric.PERPLEXITY.value: math.exp(self.mean) if self.mean < 700 else math.inf,
            EvalMetric.BITS_PER_BYTE.value: bits_per_byte,
        }


def add_up(evaluator: Evaluator, batches: Iterable[Batch], report: Callable[[int], None]) -> Sums:
    """Return the sums over batches; `report` is called with the number of batches done."""
    found = Sums()
    for sums in evaluator.losses(batches):
        found.total += float(sums.total)
        found.count += float(sums.count)
        found.correct += float(sums.correct)
        found.means += float(sums.mean)
        found.batches += 1
        report(found.batches)
    return found
