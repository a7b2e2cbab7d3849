"""Speed and memory of a run, and the time it still needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from keras import ops

from gptj_convert.resources import footprint, machine
from gptj_model.config import GPTJConfig
from gptj_model.tensors import Tensor

#: Rows and columns of the matrices whose multiplication is measured, and the number of repetitions.
_MATRIX = 1024
_TRIES = 3


class Meter:
    """Figures between one log line and the next.

    Args:
        config: configuration of the model.
        tokens: tokens per update.
        length: tokens per sequence.
        trained: trained rows.
        devices: devices that compute together, each as fast as the one that is measured.
    """

    def __init__(
        self,
        config: GPTJConfig,
        *,
        tokens: int,
        length: int,
        trained: Sequence[Tensor],
        devices: int = 1,
    ) -> None:
        self._tokens = tokens
        self._flops = tokens * footprint.token_flops(config, length, trained)
        self._peak = multiplication_rate() * devices
        self._busy = 0.0
        self._steps = 0
        self._compiled = False
        self._begun = time.monotonic()

    def begin(self) -> None:
        """Start the clock of a step; time between steps is not counted."""
        self._begun = time.monotonic()

    def end(self) -> None:
        """Stop the clock of a step."""
        self._busy += time.monotonic() - self._begun
        self._steps += 1

    def figures(self, steps_left: int) -> dict[str, float | None]:
        """Return the rates since the last call, under the keys of metrics.jsonl.

        `model_flops_utilization` is relative to a multiplication of matrices measured at the start.
        """
        seconds = self._busy / max(self._steps, 1)
        # The first step compiles, so its time predicts nothing.
        left = seconds * steps_left if self._compiled else None
        self._busy, self._steps, self._compiled = 0.0, 0, True
        achieved = self._flops / seconds if seconds else None
        # Other work may have slowed the measurement: the machine can do at least what the run
        # achieves.
        self._peak = max(self._peak, achieved or 0.0)
        return {
            "tokens_per_second": self._tokens / seconds if seconds else None,
            "seconds_per_step": seconds,
            "model_flops_utilization": achieved / self._peak if achieved else None,
            "peak_rss_bytes": machine.peak_rss(),
            "seconds_left": left,
        }


def multiplication_rate() -> float:
    """Return the floating-point operations per second of float32 matrices, where Keras computes."""
    matrix: Any = ops.ones((_MATRIX, _MATRIX))
    best = 0.0
    for _ in range(_TRIES + 1):
        begun = time.perf_counter()
        product: Any = ops.matmul(matrix, matrix)
        float(product[0, 0])
        best = max(best, 2 * _MATRIX**3 / (time.perf_counter() - begun))
    return best
