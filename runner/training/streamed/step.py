"""The passes of one training step over a streamed model.

In the forward pass, the input of each block is kept on disk; in the backward pass, each block is
recomputed. Memory holds one block, its gradients and its activations, whatever the number of blocks
and of batches, which share each block that is loaded.

Shape suffixes: B batch, T time, N tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gptj_model.config import GPTJConfig
from gptj_model.streaming.training import Draw, HeadGradients, StreamedTraining
from gptj_model.tensors import Tensor, block, embedding, head
from gptj_model.vocabulary import gather_rows
from runner.training.streamed.block_weights import BlockWeights
from runner.training.streamed.embedding_gradient import EmbeddingGradient
from runner.training.streamed.malloc_trim import give_back_freed_memory
from runner.training.streamed.scratch import Scratch


class Update(Protocol):
    """Takes gradients: float32, in Keras' layout, unscaled."""

    def room(self, tensors: Sequence[Tensor]) -> list[np.ndarray]:
        """Return arrays for the gradients of these tensors, once the gradients before have left
        them."""
        ...

    def take(self, gradients: Mapping[Tensor, np.ndarray], *, last: bool) -> None:
        """Take whole gradients.

        The gradient of the embedding from a tied head waits for that of the tokens.

        Args:
            gradients: gradients in the arrays that `room` returned.
            last: whether these are the last arrays of the step.
        """
        ...

    def take_embedding(self, tensor: Tensor, rows: EmbeddingGradient) -> None:
        """Take the gradient of the embedding by its tokens, the last one of a step."""
        ...


class StreamedStep:
    """Loss and gradients of one step.

    The hidden states of batch n before block i are kept under (n, i). Once the block's gradients
    are known, the gradient of these states takes their place.

    Freed memory is kept only while a block computes a batch, or the head its logits or its
    gradients: what follows would not always find a place in it.

    Args:
        config: configuration of the model.
        passes: compiled stages of the model.
        state: weights of the model.
        scratch: store of the hidden states.
        update: takes every gradient.
        trained: trained rows of the table or of an adapter.
    """

    def __init__(
        self,
        config: GPTJConfig,
        passes: StreamedTraining,
        state: BlockWeights,
        scratch: Scratch,
        update: Update,
        trained: Sequence[Tensor],
    ) -> None:
        self._config = config
        self._passes = passes
        self._state = state
        self._scratch = scratch
        self._update = update
        self._trained = frozenset(trained)
        self._freed = 4 * max(sum(t.size for t in block(config, 0)), embedding(config).size)
        """Bytes of the largest gradients, whose memory lies free after they are taken."""

    def run(self, batches: Sequence[tuple], draw: Draw, scale: float) -> float:
        """Return the mean of the batches' losses.

        Args:
            batches: ids, 1 on tokens that do not count, and labels; each (B, T).
            draw: seed and counter that the dropout masks start from.
            scale: factor on the loss, for the gradients.
        """
        self._forward(batches, draw)
        loss = self._head(batches, scale)
        self._backward(batches, draw, scale)
        self._embedding(batches, draw, scale)
        return loss

    def _forward(self, batches: Sequence[tuple], draw: Draw) -> None:
        weight = embedding(self._config)
        for n, (ids_BT, _, _) in enumerate(batches):
            rows_BTD = gather_rows(lambda i: self._state.rows(weight, i, i + 1)[0], ids_BT)
            self._keep(n, 0, self._passes.embed(rows_BTD, n, draw))
        for i in self._state.blocks(range(self._config.n_layer), self._passes.load):
            for n in range(len(batches)):
                give_back_freed_memory(self._freed)
                x_BTD = self._passes.forward(self._scratch.get((n, i)), i, n, draw)
                self._keep(n, i + 1, x_BTD)

    def _head(self, batches: Sequence[tuple], scale: float) -> float:
        config, rows = self._config, head(self._config)
        self._passes.load_norm(*(self._state.rows(t) for t in rows[:2]))
        if config.tie_word_embeddings:
            rows.insert(HeadGradients._fields.index("weight"), embedding(config))
        sums = None
        if any(t in self._trained for t in rows):
            sums = HeadGradients(*self._update.room(rows))
            for total in sums:
                total.fill(0)
        part, losses = self._state.head(), []

        def read(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            if not start:  # first for logits, then for gradients, whose arrays have other sizes
                give_back_freed_memory(self._freed)
            return part(start, stop)

        for n, (_, ignored_BT, labels_BT) in enumerate(batches):
            x_BTD = self._scratch.get((n, config.n_layer))
            loss, d_x_BTD = self._passes.head(x_BTD, read, sums, labels_BT, ignored_BT, scale)
            losses.append(loss)
            self._keep(n, config.n_layer, d_x_BTD)
        if sums:
            self._update.take(dict(zip(rows, sums, strict=True)), last=False)
        return math.fsum(losses) / len(losses)

    def _backward(self, batches: Sequence[tuple], draw: Draw, scale: float) -> None:
        last = self._config.n_layer - 1
        for i in self._state.blocks(range(last, -1, -1), self._passes.load):
            rows, sums = self._state.of_block(i), []
            for n in range(len(batches)):
                give_back_freed_memory(self._freed)
                x_BTD, d_out_BTD = self._scratch.get((n, i)), self._scratch.get((n, i + 1))
                d_x_BTD, gradients = self._passes.backward(x_BTD, d_out_BTD, i, n, draw, scale)
                sums = sums or self._update.room(rows)
                _sum(sums, gradients, first=n == 0)
                del gradients  # TensorFlow reuses their memory for the next ones
                self._keep(n, i, d_x_BTD)
            self._update.take(dict(zip(rows, sums, strict=True)), last=i == 0)

    def _embedding(self, batches: Sequence[tuple], draw: Draw, scale: float) -> None:
        if embedding(self._config) not in self._trained:
            return
        parts = [
            self._passes.embed_backward(self._scratch.get((n, 0)), n, draw, scale)
            for n in range(len(batches))
        ]
        d_ND = np.concatenate([d_BTD.reshape(-1, self._config.n_embd) for d_BTD in parts])
        ids_N = np.concatenate([ids_BT.reshape(-1) for ids_BT, _, _ in batches])
        self._update.take_embedding(embedding(self._config), EmbeddingGradient(ids_N, d_ND))

    def _keep(self, n: int, i: int, x_BTD: Any) -> None:
        self._scratch.put((n, i), np.asarray(x_BTD))


def _sum(sums: Sequence[np.ndarray], gradients: Sequence[np.ndarray], *, first: bool) -> None:
    """Add gradients in place; the first ones overwrite."""
    for total, gradient in zip(sums, gradients, strict=True):
        if first:
            np.copyto(total, gradient)
        else:
            total += gradient


def states_bytes(config: GPTJConfig, batches: Sequence[tuple]) -> Iterator[int]:
    """Yield the bytes of each hidden state that a step keeps."""
    for ids_BT, _, _ in batches:
        for _ in range(config.n_layer + 1):
            yield 4 * ids_BT.size * config.n_embd
