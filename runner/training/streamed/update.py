"""Gradients on their way into the next state of a streamed run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from gptj_model.config import GPTJConfig
from gptj_model.page_buffers import page_arrays, whole_pages
from gptj_model.source import TensorInfo
from gptj_model.streaming.training import Draw
from gptj_model.tensors import Scheme, Tensor, block, embedding, head
from runner.training.streamed.background import Background
from runner.training.streamed.embedding_gradient import EmbeddingGradient
from runner.training.streamed.scratch import Scratch
from runner.training.streamed.state import Gradient, StreamedState, pieces
from runner.training.update.rule import UpdateRule

#: Number of elements whose squares are summed in float32 before the sum continues in float64.
_SUMMED = 2**16


class StreamedUpdate:
    """One update from gradients that arrive a few tensors at a time, in the background.

    Without clipping by norm they go into the next state at once, which counts only if their norm
    turns out to be finite. With it they wait on disk until the norm is known, except the last ones,
    which stay in memory.

    Args:
        state: current state.
        rule: rule of the update.
        memory: memory for the gradients of any stage; see `room_bytes`.
        scratch: store of waiting gradients.
        background: runs the work, after what remains of the step before.
        rate: learning rate.
        correction: factor from `BetaPowers`.
        draw: seed and counter of the step.
    """

    def __init__(
        self,
        state: StreamedState,
        rule: UpdateRule,
        memory: np.ndarray,
        scratch: Scratch,
        background: Background,
        rate: float,
        correction: Any,
        draw: Draw,
    ) -> None:
        self._state = state
        self._rule = rule
        self._memory = memory
        self._scratch = scratch
        self._background = background
        self._arguments = rate, correction, draw
        self._kept: dict[Tensor, Gradient] = {}
        self._written: set[Tensor] = set()
        self._squares = 0.0

    def room(self, tensors: Sequence[Tensor]) -> list[np.ndarray]:
        """Implement `Update`."""
        self._background.wait()
        return page_arrays(self._memory, [_info(t) for t in tensors])

    def take(self, gradients: Mapping[Tensor, np.ndarray], *, last: bool) -> None:
        """Implement `Update`."""
        self._background.submit(self._run, gradients, last)

    def take_embedding(self, tensor: Tensor, rows: EmbeddingGradient) -> None:
        """Implement `Update`."""
        self._background.wait()
        self._background.submit(self._run_embedding, tensor, rows)

    def finish(self) -> float:
        """Return the norm. If it is finite, the next state becomes the current one, and what is
        missing of it is written in the order in which a step reads it."""
        self._background.wait()
        with np.errstate(over="ignore"):
            norm = float(np.sqrt(np.float32(self._squares)))
        if not math.isfinite(norm):
            self._state.discard()
            return norm
        self._state.advance()
        self._background.submit(self._run_rest, norm)
        return norm

    def _run_rest(self, norm: float) -> None:
        rows = [t for t in self._state.tensors if t not in self._written]
        self._state.update(((t, self._kept.get(t)) for t in rows), norm, *self._arguments)

    def _run(self, gradients: Mapping[Tensor, np.ndarray], last: bool) -> None:
        for tensor, gradient in gradients.items():
            if tensor not in self._state.trained:
                continue
            flat = gradient.reshape(-1)
            if tensor == self._state.tensors[0]:
                self._keep(tensor, flat)
                continue
            self._squares += _squares(flat)
            if not self._rule.clips_by_norm:
                self._write(tensor, partial(_fill, flat))
            elif last:
                self._kept[tensor] = partial(_fill, flat)
            else:
                self._keep(tensor, flat)

    def _run_embedding(self, tensor: Tensor, rows: EmbeddingGradient) -> None:
        if tensor not in self._state.trained:
            return
        of_head = self._kept.get(tensor)
        gradient = partial(_fill_sum, of_head, rows.fill) if of_head else rows.fill
        for start, size in pieces(tensor):
            values = np.empty(size, np.float32)
            gradient(start, values)
            self._squares += _squares(values)
        if self._rule.clips_by_norm:
            self._kept[tensor] = gradient
        else:
            self._write(tensor, gradient)

    def _keep(self, tensor: Tensor, gradient: np.ndarray) -> None:
        self._scratch.put(tensor.tf, gradient)
        self._kept[tensor] = partial(self._scratch.fill, tensor.tf)

    def _write(self, tensor: Tensor, gradient: Gradient) -> None:
        self._state.update([(tensor, gradient)], 0.0, *self._arguments)
        self._written.add(tensor)


def room_bytes(config: GPTJConfig) -> int:
    """Return the size of the memory that `StreamedUpdate` needs."""
    tied = [embedding(config)] if config.tie_word_embeddings else []
    stages = block(config, 0), [*tied, *head(config)]
    return max(sum(whole_pages(_info(t).nbytes) for t in stage) for stage in stages)


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo("float32", tensor.shape_in(Scheme.KERAS))


def _fill(flat: np.ndarray, start: int, values: np.ndarray) -> None:
    values[:] = flat[start : start + values.size]


def _fill_sum(one: Gradient, other: Gradient, start: int, values: np.ndarray) -> None:
    one(start, values)
    more = np.empty_like(values)
    other(start, more)
    values += more


def _squares(values: np.ndarray) -> float:
    """Return the sum of squares, infinite or NaN if a value is."""
    flat = values.reshape(-1)
    parts = (flat[n : n + _SUMMED] for n in range(0, flat.size, _SUMMED))
    return sum(float(np.vdot(part, part)) for part in parts)
