"""The compiled stages of one training step of a GPT-J that is run one block at a time.

Layers and loss are those of `GPTJ`. A stage gets its weights before it runs, and the gradients of a
stage are computed from those of the next stage.

Shape suffixes: B batch, T time, N tokens, C tokens of a chunk, D hidden, V vocabulary, P part of
the vocabulary.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportOptionalOperand=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from gptj_model.config import GPTJConfig
from gptj_model.lora import Lora
from gptj_model.network.layers import Block, Context, Dropout, layer_norm
from gptj_model.network.loss import RunningLoss, head_gradients, head_logits
from gptj_model.network.model import make_context
from gptj_model.network.weights import adapted_layer, assigned_variables, forget
from gptj_model.streaming.shared_tensor import shared_tensor
from gptj_model.tensors import FINAL_NORM, block
from gptj_model.vocabulary import parts

#: Largest number of logits held at once: 512 MiB of float32.
_LOGITS = 2**27

Draw = tuple[int, int]
"""Seed and counter that the dropout masks of a batch start from."""


class HeadGradients(NamedTuple):
    """Gradients of the layers after the blocks; float32, in the order of `tensors.head`."""

    gain_D: np.ndarray
    """Gradient of the final norm's gain."""
    shift_D: np.ndarray
    weight: np.ndarray
    """Gradient of the head's weight: (D, V), or (V, D) of the embedding that the head is tied
    to."""
    bias_V: np.ndarray


ReadHead = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""Returns the head's weight in its layout, and its bias, for tokens start:stop of the
vocabulary."""


class StreamedTraining:
    """The stages `embed`, `forward` and `head`, and in reverse `backward` and `embed_backward`.

    Hidden states are in the compute dtype; gradients of weights are float32, in Keras' layout,
    without the loss scale. Dropout masks are those that the resident model draws.

    Args:
        config: configuration of the model.
        dtype: Keras dtype or policy.
        accumulate: number of batches per update, whose gradients are averaged.
        lora: adapter of the blocks; the gradients of a block are then those of its adapter.
        head_rows: whether parts of the head's weight are (P, D), one row per token.
    """

    def __init__(
        self,
        config: GPTJConfig,
        *,
        dtype: str,
        accumulate: int,
        lora: Lora | None = None,
        head_rows: bool,
    ) -> None:
        self._config = config
        self._accumulate = accumulate
        self._seeds = keras.random.SeedGenerator(0)
        policy = keras.dtype_policies.get(dtype)
        self._dtype = policy.compute_dtype
        self._drop = Dropout(config.embd_pdrop, self._seeds, dtype=policy)
        self._block = Block(config, self._seeds, name="h_0", dtype=policy)
        self._norm = layer_norm(config, FINAL_NORM[0].layer, policy)
        for layer in (self._block, self._norm):
            layer.build((None, None, config.n_embd))
        rows = {t.hf: t for t in block(config, 0)}
        self._weights = list(assigned_variables(self._block, rows, prefix="").values())
        self._trained = self._weights
        if lora:
            self._trained = list(_adapted(self._block, lora, config))
            self._weights = [*self._weights, *self._trained]
        self._head_rows = head_rows
        self._embed = _compiled(self._run_embed)
        self._embed_back = _compiled(self._run_embed_back)
        self._forward = _compiled(self._run_block)
        self._backward = _compiled(self._run_block_back)
        self._normed = _compiled(self._norm)
        self._normed_back = _compiled(self._run_norm_back)
        self._logits = _compiled(self._run_logits)
        self._logits_back = _compiled(self._run_logits_back)
        self._context = lru_cache(maxsize=1)(partial(_context, config))

    def reset(self) -> None:
        """Forget the weights that were loaded: they are NaN until others are."""
        forget((*self._weights, *self._norm.weights))

    def load(self, weights: Sequence[np.ndarray]) -> None:
        """Load the weights of a block: those of `tensors.block` in Keras' layout, then A and B of
        each adapted kernel. Memory is shared where possible; see `shared_tensor`."""
        for variable, values in zip(self._weights, weights, strict=True):
            variable.assign(shared_tensor(values))

    def embed(self, rows_BTD: np.ndarray, batch: int, draw: Draw) -> Any:
        """Return the embeddings of a batch's tokens as hidden states.

        Args:
            rows_BTD: float32 rows of the embedding.
            batch: index of the batch in the step.
            draw: start of the step's dropout masks.
        """
        return self._embed(rows_BTD, self._state(draw, batch, 0))

    def forward(self, x_BTD: Any, i: int, batch: int, draw: Draw) -> Any:
        """Return the hidden states after block `i`, whose weights are loaded."""
        state = self._state(draw, batch, i + 1)
        return self._forward(x_BTD, self._context(x_BTD.shape[1]), state)

    def load_norm(self, gain_D: np.ndarray, shift_D: np.ndarray) -> None:
        """Load the weights of the final norm."""
        self._norm.gamma.assign(gain_D)
        self._norm.beta.assign(shift_D)

    def head(
        self,
        x_BTD: Any,
        read: ReadHead,
        sums: HeadGradients | None,
        labels_BT: np.ndarray,
        ignored_BT: np.ndarray,
        scale: float,
    ) -> tuple[float, Any]:
        """Return the loss of a batch, and the gradient of its hidden states after the last block.

        Only the logits of some tokens, and a part of the head, are in memory at once.

        Args:
            x_BTD: hidden states; the final norm is loaded.
            read: returns parts of the head.
            sums: gradients of norm and head, which are added to in place; None skips them.
            labels_BT: int32 token ids.
            ignored_BT: 1 on tokens that do not count, 0 elsewhere.
            scale: factor on the loss, for the gradients.
        """
        h_ND = ops.reshape(self._normed(x_BTD), (-1, self._config.n_embd))
        labels_N = labels_BT.reshape(-1)
        ignored_N = np.asarray(ignored_BT, np.float32).reshape(-1)
        count = max(float((1 - ignored_N).sum()), 1.0)
        share = np.float32(scale) / self._accumulate / np.float32(count)
        step = max(1, _LOGITS // self._config.vocab_size)
        total, d_h = 0.0, []
        for first in range(0, labels_N.size, step):
            part = slice(first, first + step)
            loss, d_h_CD = self._head_chunk(
                h_ND[part], read, sums, labels_N[part], ignored_N[part], share / np.float32(scale)
            )
            total += loss
            d_h.append(ops.cast(d_h_CD * share, self._dtype))
        d_h_BTD = ops.reshape(ops.concatenate(d_h), x_BTD.shape)
        d_x_BTD, *of_norm = self._normed_back(x_BTD, d_h_BTD, _factor(scale))
        for so_far, gradient in zip(sums[:2] if sums else (), of_norm, strict=False):
            so_far += gradient.numpy()
        return total / count, d_x_BTD

    def _head_chunk(
        self,
        h_CD: Any,
        read: ReadHead,
        sums: HeadGradients | None,
        labels_C: np.ndarray,
        ignored_C: np.ndarray,
        factor: np.float32,
    ) -> tuple[float, np.ndarray]:
        """Return the summed loss of some tokens, and its gradient of h; add `factor` times the
        gradients of the head to `sums`, if there are any."""
        loss = RunningLoss(labels_C)
        logits: list[Any] = []
        for start, stop in parts(self._config):
            logits.append(self._logits(h_CD, *map(shared_tensor, read(start, stop))))
            loss.add(logits[-1].numpy(), 0, start)
        log_sum_C = loss.log_sum_N.astype(np.float32)
        d_h_CD = np.zeros(h_CD.shape, np.float32)
        for start, stop in parts(self._config):
            weight, _ = read(start, stop)
            d_more_CD, *of_head = self._logits_back(
                h_CD,
                logits.pop(0),
                log_sum_C,
                labels_C - start,
                1 - ignored_C,
                shared_tensor(weight),
                factor,
                sums is not None,
            )
            d_h_CD += d_more_CD.numpy()
            if sums:
                rows = slice(start, stop)
                place = rows if self._head_rows else (slice(None), rows)
                sums.weight[place] += of_head[0].numpy()
                sums.bias_V[rows] += of_head[1].numpy()
        return float(loss.sums(ignored_C).total), d_h_CD

    def backward(
        self, x_BTD: Any, d_out_BTD: Any, i: int, batch: int, draw: Draw, scale: float
    ) -> tuple[Any, list[np.ndarray]]:
        """Return the gradient of `x_BTD`, and those of the block's weights (or adapter) in their
        order, from the gradient of the output of block `i`; recomputes the block."""
        state, context = self._state(draw, batch, i + 1), self._context(x_BTD.shape[1])
        d_x_BTD, gradients = self._backward(x_BTD, context, d_out_BTD, state, _factor(scale))
        return d_x_BTD, [g.numpy() for g in gradients]

    def embed_backward(self, d_x_BTD: Any, batch: int, draw: Draw, scale: float) -> np.ndarray:
        """Return the gradient of the embedding rows (B, T, D) from the gradient of the output of
        `embed`."""
        state = self._state(draw, batch, 0)
        return self._embed_back(d_x_BTD, state, _factor(scale)).numpy()

    def _state(self, draw: Draw, batch: int, stage: int) -> Any:
        """Return the state of the mask generator before a stage: the embedding is stage 0, block i
        is stage i + 1."""
        config = self._config
        first = int(config.embd_pdrop > 0)
        each = int(config.attn_pdrop > 0) + 2 * int(config.resid_pdrop > 0)
        before = batch * (first + config.n_layer * each)
        if stage:
            before += first + (stage - 1) * each
        return tf.constant([draw[0], draw[1] + before], self._seeds.state.dtype)

    def _run_embed(self, rows_BTD: Any, state: Any) -> Any:
        self._seeds.state.assign(state)
        return self._drop(ops.cast(rows_BTD, self._dtype), training=True)

    def _run_embed_back(self, d_x_BTD: Any, state: Any, scale: Any) -> Any:
        # The mask does not depend on the values.
        rows_BTD = tf.zeros(d_x_BTD.shape, self._dtype)
        with tf.GradientTape() as tape:
            tape.watch(rows_BTD)
            x_BTD = self._run_embed(rows_BTD, state)
        return _unscaled(tape.gradient(x_BTD, rows_BTD, output_gradients=d_x_BTD), scale)

    def _run_block(self, x_BTD: Any, context: Any, state: Any) -> Any:
        self._seeds.state.assign(state)
        return self._block(x_BTD, context, training=True)[0]

    def _run_block_back(
        self, x_BTD: Any, context: Any, d_out_BTD: Any, state: Any, scale: Any
    ) -> tuple[Any, list[Any]]:
        weights = [w.value for w in self._trained]
        with tf.GradientTape() as tape:
            tape.watch(x_BTD)
            out_BTD = self._run_block(x_BTD, context, state)
        d_x_BTD, *gradients = tape.gradient(out_BTD, [x_BTD, *weights], output_gradients=d_out_BTD)
        return d_x_BTD, [_unscaled(g, scale) for g in gradients]

    def _run_norm_back(self, x_BTD: Any, d_h_BTD: Any, scale: Any) -> tuple[Any, ...]:
        sources = [x_BTD, self._norm.gamma.value, self._norm.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(x_BTD)
            h_BTD = self._norm(x_BTD)
        d_x_BTD, *gradients = tape.gradient(h_BTD, sources, output_gradients=d_h_BTD)
        return d_x_BTD, *(_unscaled(g, scale) for g in gradients)

    def _kernel(self, weight: Any) -> Any:
        """Return a part of the head's kernel (D, P) in the compute dtype."""
        return ops.cast(ops.transpose(weight) if self._head_rows else weight, self._dtype)

    def _run_logits(self, h_CD: Any, weight: Any, bias_P: Any) -> Any:
        weight, bias_P = (ops.cast(x, "float32") for x in (weight, bias_P))
        return head_logits(h_CD, self._kernel(weight), bias_P)

    def _run_logits_back(
        self,
        h_CD: Any,
        logits_CP: Any,
        log_sum_C: Any,
        labels_C: Any,
        counted_C: Any,
        weight: Any,
        factor: Any,
        of_head: bool,
    ) -> tuple[Any, ...]:
        """Return the gradients of the summed loss: that of h by a part of the head, and `factor`
        times those of that part."""
        kernel_DP = self._kernel(ops.cast(weight, "float32"))
        probability_CP = ops.exp(logits_CP - log_sum_C[:, None])
        d_h_CD, *of_kernel = head_gradients(
            h_CD, probability_CP, labels_C, counted_C, kernel_DP, of_head=of_head
        )
        if not of_kernel:
            return (d_h_CD,)
        d_kernel_DP, d_bias_P = of_kernel
        d_weight = ops.transpose(d_kernel_DP) if self._head_rows else d_kernel_DP
        return d_h_CD, d_weight * factor, d_bias_P * factor


def _adapted(layers: Block, lora: Lora, config: GPTJConfig) -> Iterator[Any]:
    """Yield A and B of each adapted kernel of a block, in the table's order."""
    for kernel in lora.rows(config):
        if kernel.block == 0:
            layer = adapted_layer(layers, kernel)
            layer.enable_lora(lora.rank, lora.alpha)
            yield layer.lora_kernel_a
            yield layer.lora_kernel_b


def _context(config: GPTJConfig, T: int) -> Context:
    return make_context(config, T, T)


def _factor(scale: float) -> Any:
    """Return a loss scale as the stages take it; None stands for 1 and spares a pass over every
    gradient."""
    return None if scale == 1 else tf.constant(scale, tf.float32)


def _unscaled(gradient: Any, scale: Any) -> Any:
    gradient = tf.cast(gradient, tf.float32)
    return gradient if scale is None else gradient * (1 / scale)


def _compiled(run: Callable[..., Any]) -> Any:
    return tf.function(run, jit_compile=True, autograph=False)
