"""Evaluation over records: the reference's metrics under its names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import tensorflow as tf

from gptj_model.errors import DataFault
from gptj_model.network.loss import TokenLoss
from gptj_model.network.model import GPTJ
from gptj_model.streaming.forward import StreamedModel
from runner.data.reading.input_fn import Batch
from runner.evaluation.compiled import program_text

LOSS = "loss"
ACCURACY = "eval/accuracy"
PERPLEXITY = "eval/lm_perplexity"
BITS_PER_BYTE = "eval/bits_per_byte"

#: Bytes of hidden states that share one reading of the weights, if not told.
STATES = 2**28


class Evaluator(Protocol):
    """A model, as far as it is evaluated."""

    def losses(self, batches: Iterable[Batch]) -> Iterator[TokenLoss]:
        """Sums over each batch, in order."""
        ...


class ResidentEvaluator:
    """A model that is in memory, compiled once."""

    def __init__(self, model: GPTJ) -> None:
        @tf.function(jit_compile=True)
        def run(ids_BT, ignored_BT, labels_BT):
            return model.token_loss(ids_BT, labels_BT, ignored_BT)

        self._run = run

    def compiled(self, batch: Batch) -> str:
        """The compiled program of one batch, as text; nothing is run."""
        return program_text(self._run, *batch)

    def losses(self, batches: Iterable[Batch]) -> Iterator[TokenLoss]:
        """See `Evaluator`."""
        return (self._run(*batch) for batch in batches)


class StreamedEvaluator:
    """A model that is read block by block, once for so many batches as fit beside it.

    Args:
        model: gives it as it is at an evaluation; see `StreamedModel`.
        memory: bytes that the hidden states of a pass may take.
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
        """The next batches whose states fit; at least one, if there is any."""
        found: list[Batch] = []
        room, size = self._memory, 0
        while room >= size and (batch := next(batches, None)) is not None:
            found.append(batch)
            size = 4 * int(tf.size(batch[0])) * width
            room -= size
        return found


def _pass(model: StreamedModel, group: Sequence[Batch]) -> list[TokenLoss]:
    """The losses of batches that share one reading of the weights."""
    states = [model.embed(np.asarray(ids_BT)) for ids_BT, _, _ in group]
    B, T = states[0].shape[:2]
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    for block in model.blocks():
        for n, x_BTD in enumerate(states):
            states[n] = block.run(x_BTD, positions_BT[: len(x_BTD)])
    head = model.head()
    for n, x_BTD in enumerate(states):
        (states[n],) = head.normed([x_BTD])
    return head.losses(states, [batch[1:] for batch in group])


def evaluate(
    evaluator: Evaluator,
    batches: Iterable[Batch],
    *,
    tokens_per_byte: float,
    limit: int = 0,
    report: Callable[[int], None] = lambda n: None,
) -> dict[str, float]:
    """Metrics over batches.

    `loss` is the mean over the batches of each batch's token mean; the others weigh every token
    alike.

    Args:
        evaluator: of the model.
        batches: what to evaluate on.
        tokens_per_byte: for bits per byte.
        limit: number of batches; 0 means all.
        report: is told how many are done.

    Raises:
        DataFault: no token counts.
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
    """Over all batches."""

    total: float = 0.0
    """Of the cross-entropies of the tokens that count, in nats."""
    count: float = 0.0
    correct: float = 0.0
    means: float = 0.0
    """Of each batch's token mean."""
    batches: int = 0

    @property
    def mean(self) -> float:
        """Over all tokens that count."""
        return self.total / self.count

    def metrics(self, *, loss: float, bits_per_byte: float) -> dict[str, float]:
        """Under the reference's names, with what depends on the kind of evaluation."""
        return {
            LOSS: loss,
            ACCURACY: self.correct / self.count,
            PERPLEXITY: math.exp(self.mean) if self.mean < 700 else math.inf,
            BITS_PER_BYTE: bits_per_byte,
        }


def add_up(evaluator: Evaluator, batches: Iterable[Batch], report: Callable[[int], None]) -> Sums:
    """Sums over batches; `report` is told how many are done."""
    found = Sums()
    for sums in evaluator.losses(batches):
        found.total += float(sums.total)
        found.count += float(sums.count)
        found.correct += float(sums.correct)
        found.means += float(sums.mean)
        found.batches += 1
        report(found.batches)
    return found
