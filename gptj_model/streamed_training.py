"""One training step of a GPT-J that is run one block at a time: its compiled stages.

The layers and the loss are those of `GPTJ`; what differs is that a stage is given its weights
before it runs, and that the gradients of a stage are asked for with those of what follows it.

Shape suffixes: B batch, T time, N tokens, D hidden, V vocabulary.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from gptj_model.config import GPTJConfig
from gptj_model.layers import Block, Dropout, layer_norm
from gptj_model.loss import head_loss
from gptj_model.model import make_context
from gptj_model.tensors import FINAL_NORM, block
from gptj_model.weights import assigned_variables

Draw = tuple[int, int]
"""Seed and counter that the dropout masks of a batch begin with."""


class HeadResult(NamedTuple):
    """What the head gives for one batch."""

    loss: float
    d_x_BTD: Any
    """The gradient of the hidden states that it was given."""
    gradients: list[np.ndarray]
    """Of its weights, in their order, in float32 and without the loss scale."""


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
        self._head = _compiled(self._run_head)

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
        return self._forward(x_BTD, self._state(draw, batch, i + 1))

    def head(
        self,
        x_BTD: Any,
        weights: Sequence[np.ndarray],
        labels_BT: Any,
        ignored_BT: Any,
        scale: float,
    ) -> HeadResult:
        """Loss and gradients of the hidden states after the last block.

        Args:
            x_BTD: the states.
            weights: gain and bias of the final norm, the head's kernel (D, V) or the embedding
                (V, D) that it is tied to, the head's bias.
            labels_BT: int32 token ids.
            ignored_BT: 1 on tokens that do not count, 0 elsewhere.
            scale: of the loss, for the gradients.
        """
        gain_D, shift_D, *head = weights
        self._norm.gamma.assign(gain_D)
        self._norm.beta.assign(shift_D)
        factor = tf.constant(scale, tf.float32)
        loss, d_x_BTD, gradients = self._head(x_BTD, *head, labels_BT, ignored_BT, factor)
        return HeadResult(float(loss), d_x_BTD, [g.numpy() for g in gradients])

    def backward(
        self, x_BTD: Any, d_out_BTD: Any, i: int, batch: int, draw: Draw, scale: float
    ) -> tuple[Any, list[np.ndarray]]:
        """From the gradient of what block `i` gave for `x_BTD`, that of `x_BTD`, and those of the
        block's weights in their order; computes the block once more."""
        state, factor = self._state(draw, batch, i + 1), tf.constant(scale, tf.float32)
        d_x_BTD, gradients = self._backward(x_BTD, d_out_BTD, state, factor)
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

    def _run_block(self, x_BTD, state):
        self._seeds.state.assign(state)
        T = x_BTD.shape[1]
        return self._block(x_BTD, make_context(self._config, T, T), training=True)[0]

    def _run_block_back(self, x_BTD, d_out_BTD, state, scale):
        weights = [w.value for w in self._weights]
        with tf.GradientTape() as tape:
            tape.watch(x_BTD)
            out_BTD = self._run_block(x_BTD, state)
        d_x_BTD, *gradients = tape.gradient(out_BTD, [x_BTD, *weights], output_gradients=d_out_BTD)
        return d_x_BTD, [_unscaled(g, scale) for g in gradients]

    def _run_head(self, x_BTD, weight, bias_V, labels_BT, ignored_BT, scale):
        sources = [x_BTD, self._norm.gamma.value, self._norm.beta.value, weight, bias_V]
        with tf.GradientTape() as tape:
            tape.watch([x_BTD, weight, bias_V])
            kernel_DV = ops.transpose(weight) if self._config.tie_word_embeddings else weight
            h_BTD = self._norm(x_BTD)
            loss = head_loss(h_BTD, kernel_DV, bias_V, labels_BT, ignored_BT, training=True).mean
            scaled = loss * (scale / self._accumulate)
        d_x_BTD, *gradients = tape.gradient(scaled, sources)
        return loss, d_x_BTD, [_unscaled(g, scale) for g in gradients]


def _unscaled(gradient: Any, scale: Any) -> Any:
    return tf.cast(gradient, tf.float32) * (1 / scale)


def _compiled(run: Callable[..., Any]) -> Any:
    return tf.function(run, jit_compile=True, autograph=False)
