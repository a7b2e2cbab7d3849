"""One training step of a GPT-J that is run one block at a time: its compiled stages.

The layers and the loss are those of `GPTJ`; what differs is that a stage is given its weights
before it runs, and that the gradients of a stage are asked for with those of what follows it.

Shape suffixes: B batch, T time, N tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from gptj_model.config import GPTJConfig
from gptj_model.layers import Block, Context, Dropout, layer_norm
from gptj_model.loss import chunk_loss, token_chunks
from gptj_model.model import make_context
from gptj_model.tensors import FINAL_NORM, block
from gptj_model.weights import assigned_variables

#: Logits that are held at once, at most: 256 MiB of float32.
_LOGITS = 2**26
#: Elements of a gradient that are added at once.
_ADDED = 2**16

Draw = tuple[int, int]
"""Seed and counter that the dropout masks of a batch begin with."""


class HeadWeights(NamedTuple):
    """What follows the blocks; as weights, and as their gradients."""

    gain_D: np.ndarray
    """Of the final norm."""
    shift_D: np.ndarray
    kernel: np.ndarray
    """(D, V), or the embedding (V, D) that the head is tied to."""
    bias_V: np.ndarray


class StreamedTraining:
    """The stages `embed`, `forward` and `head`, and back again `backward` and `embed_backward`.

    Hidden states are in the compute dtype; gradients of weights in float32, in Keras' layout,
    without the loss scale. Every mask is the one that the resident model draws.

    Args:
        config: of the model.
        dtype: a Keras dtype or policy.
        accumulate: batches of one update, whose gradients are averaged.
    """

    def __init__(self, config: GPTJConfig, *, dtype: str, accumulate: int) -> None:
        self._config = config
        self._accumulate = accumulate
        self._seeds = keras.random.SeedGenerator(0)
        policy = keras.dtype_policies.get(dtype)
        self._dtype = policy.compute_dtype
        self._drop = Dropout(config.embd_pdrop, self._seeds, dtype=policy)
        self._block = Block(config, self._seeds, name="h_0", dtype=policy)
        self._norm = layer_norm(config, FINAL_NORM[0].keras.split("/")[0], policy)
        for layer in (self._block, self._norm):
            layer.build((None, None, config.n_embd))
        rows = {t.hf: t for t in block(config, 0)}
        self._weights = list(assigned_variables(self._block, rows, prefix="").values())
        self._embed = _compiled(self._run_embed)
        self._embed_back = _compiled(self._run_embed_back)
        self._forward = _compiled(self._run_block)
        self._backward = _compiled(self._run_block_back)
        self._normed = _compiled(self._norm)
        self._normed_back = _compiled(self._run_norm_back)
        self._chunk = _compiled(self._run_chunk)
        self._context = lru_cache(maxsize=1)(partial(_context, config))

    def load(self, weights: Sequence[np.ndarray]) -> None:
        """Make these weights the block's: those of `tensors.block`, in Keras' layout."""
        for variable, values in zip(self._weights, weights, strict=True):
            variable.assign(values)

    def embed(self, rows_BTD: np.ndarray, batch: int, draw: Draw) -> Any:
        """The embeddings of a batch's tokens as hidden states.

        Args:
            rows_BTD: float32 rows of the embedding.
            batch: its number among those of the step.
            draw: of the step.
        """
        return self._embed(rows_BTD, self._state(draw, batch, 0))

    def forward(self, x_BTD: Any, i: int, batch: int, draw: Draw) -> Any:
        """Hidden states before block `i`, whose weights are loaded → after it."""
        state = self._state(draw, batch, i + 1)
        return self._forward(x_BTD, self._context(x_BTD.shape[1]), state)

    def head(
        self,
        x_BTD: Any,
        weights: HeadWeights,
        sums: HeadWeights,
        labels_BT: np.ndarray,
        ignored_BT: np.ndarray,
        scale: float,
    ) -> tuple[float, Any]:
        """Loss of a batch, and the gradient of its hidden states after the last block.

        The logits of a chunk of tokens at a time are there, as in `head_loss`.

        Args:
            x_BTD: the states.
            weights: of the head.
            sums: their gradients are added to these, in place.
            labels_BT: int32 token ids.
            ignored_BT: 1 on tokens that do not count, 0 elsewhere.
            scale: of the loss, for the gradients.
        """
        self._norm.gamma.assign(weights.gain_D)
        self._norm.beta.assign(weights.shift_D)
        h_ND = ops.reshape(self._normed(x_BTD), (-1, self._config.n_embd))
        counted_N = 1 - np.asarray(ignored_BT, np.float32).reshape(-1)
        labels_N = labels_BT.reshape(-1)
        kernel, bias_V = map(ops.convert_to_tensor, (weights.kernel, weights.bias_V))
        share = np.float32(scale) / self._accumulate / max(counted_N.sum(), 1)
        total, d_h = 0.0, []
        for part in token_chunks(labels_N.size, self._config.vocab_size, _LOGITS):
            loss, *gradients, d_h_CD = self._chunk(
                h_ND[part], labels_N[part], counted_N[part], kernel, bias_V, share
            )
            total += float(loss)
            d_h.append(d_h_CD)
            for so_far, gradient in zip(sums[2:], gradients, strict=True):
                _add(so_far, gradient.numpy(), share / np.float32(scale))
            del gradients
        d_h_BTD = ops.reshape(ops.concatenate(d_h), x_BTD.shape)
        d_x_BTD, *of_norm = self._normed_back(x_BTD, d_h_BTD, np.float32(scale))
        for so_far, gradient in zip(sums[:2], of_norm, strict=True):
            so_far += gradient.numpy()
        return float(total / max(counted_N.sum(), 1)), d_x_BTD

    def backward(
        self, x_BTD: Any, d_out_BTD: Any, i: int, batch: int, draw: Draw, scale: float
    ) -> tuple[Any, list[np.ndarray]]:
        """From the gradient of what block `i` gave for `x_BTD`, that of `x_BTD`, and those of the
        block's weights in their order; computes the block once more."""
        state, factor = self._state(draw, batch, i + 1), tf.constant(scale, tf.float32)
        context = self._context(x_BTD.shape[1])
        d_x_BTD, gradients = self._backward(x_BTD, context, d_out_BTD, state, factor)
        return d_x_BTD, [g.numpy() for g in gradients]

    def embed_backward(self, d_x_BTD: Any, batch: int, draw: Draw, scale: float) -> np.ndarray:
        """From the gradient of what `embed` gave, that of the rows it was given: (B, T, D)."""
        state, factor = self._state(draw, batch, 0), tf.constant(scale, tf.float32)
        return self._embed_back(d_x_BTD, state, factor).numpy()

    def _state(self, draw: Draw, batch: int, stage: int) -> Any:
        """That of the generator of masks before a stage: the embedding is 0, block i is i + 1."""
        config = self._config
        first = int(config.embd_pdrop > 0)
        each = int(config.attn_pdrop > 0) + 2 * int(config.resid_pdrop > 0)
        before = batch * (first + config.n_layer * each)
        if stage:
            before += first + (stage - 1) * each
        return tf.constant([draw[0], draw[1] + before], self._seeds.state.dtype)

    def _run_embed(self, rows_BTD, state):
        self._seeds.state.assign(state)
        return self._drop(ops.cast(rows_BTD, self._dtype), training=True)

    def _run_embed_back(self, d_x_BTD, state, scale):
        # The mask does not depend on what it is applied to.
        rows_BTD = tf.zeros(d_x_BTD.shape, self._dtype)
        with tf.GradientTape() as tape:
            tape.watch(rows_BTD)
            x_BTD = self._run_embed(rows_BTD, state)
        return _unscaled(tape.gradient(x_BTD, rows_BTD, output_gradients=d_x_BTD), scale)

    def _run_block(self, x_BTD, context, state):
        self._seeds.state.assign(state)
        return self._block(x_BTD, context, training=True)[0]

    def _run_block_back(self, x_BTD, context, d_out_BTD, state, scale):
        weights = [w.value for w in self._weights]
        with tf.GradientTape() as tape:
            tape.watch(x_BTD)
            out_BTD = self._run_block(x_BTD, context, state)
        d_x_BTD, *gradients = tape.gradient(out_BTD, [x_BTD, *weights], output_gradients=d_out_BTD)
        return d_x_BTD, [_unscaled(g, scale) for g in gradients]

    def _run_norm_back(self, x_BTD, d_h_BTD, scale):
        sources = [x_BTD, self._norm.gamma.value, self._norm.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(x_BTD)
            h_BTD = self._norm(x_BTD)
        d_x_BTD, *gradients = tape.gradient(h_BTD, sources, output_gradients=d_h_BTD)
        return d_x_BTD, *(_unscaled(g, scale) for g in gradients)

    def _run_chunk(self, h_CD, labels_C, counted_C, weight, bias_V, share):
        """The loss, its gradients of weight and bias, and `share` times that of h."""
        tied = self._config.tie_word_embeddings
        kernel_DV = ops.cast(ops.transpose(weight) if tied else weight, self._dtype)
        loss, _, d_kernel_DV, d_bias_V, d_h_CD = chunk_loss(
            h_CD, labels_C, counted_C, kernel_DV, bias_V, training=True
        )
        d_weight = ops.transpose(d_kernel_DV) if tied else d_kernel_DV
        return loss, d_weight, d_bias_V, ops.cast(d_h_CD * share, self._dtype)


def _context(config: GPTJConfig, T: int) -> Context:
    return make_context(config, T, T)


def _add(total: np.ndarray, gradient: np.ndarray, factor: np.float32) -> None:
    """Add a multiple, in place and in pieces that stay in the cache."""
    total, gradient = total.reshape(-1), gradient.reshape(-1)
    for n in range(0, total.size, _ADDED):
        total[n : n + _ADDED] += gradient[n : n + _ADDED] * factor


def _unscaled(gradient: Any, scale: Any) -> Any:
    return tf.cast(gradient, tf.float32) * (1 / scale)


def _compiled(run: Callable[..., Any]) -> Any:
    return tf.function(run, jit_compile=True, autograph=False)
