"""Evaluation of a model in memory by TensorFlow, and compiled programs as text.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow as tf

from gptj_model.network.loss import TokenLoss
from gptj_model.network.model import GPTJ
from runner.data.reading.input_fn import Batch


class ResidentEvaluator:
    """Evaluates a model in memory, compiled once for each model."""

    def __init__(self, model: GPTJ) -> None:
        @tf.function(jit_compile=True, autograph=False)
        def run(ids_BT, ignored_BT, labels_BT):
            return model.token_loss(ids_BT, labels_BT, ignored_BT)

        self._run = model.once("loss", lambda: run)

    def compiled(self, batch: Batch) -> str:
        """Return the compiled program of one batch as text, without running it."""
        return program_text(self._run, *batch)

    def losses(self, batches: Iterable[Batch]) -> Iterator[TokenLoss]:
        """See `Evaluator`."""
        return (self._run(*batch) for batch in batches)


def program_text(function: Any, *arguments: Any) -> str:
    """Return what a compiled function becomes for such arguments; nothing is run."""
    tf.random.set_seed(0)  # TensorFlow draws a random number here, to see where that is done
    return function.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
