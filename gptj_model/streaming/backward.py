"""Gradients of a GPT-J that is run one block at a time: its stages in reverse.

Shape suffixes: N tokens, B batch, T time, D hidden, V vocabulary, U distinct tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from gptj_model.network.loss import token_loss
from gptj_model.op import Op
from gptj_model.streaming.forward import StreamedModel
from gptj_model.tensors import HEAD_BIAS, HEAD_WEIGHT, Scheme, block, final_norm

Gradients = dict[str, np.ndarray]
"""Gradients by HF name, float32, in HF's layout."""


class StreamedGradients(StreamedModel):
    """The stages in reverse: each takes the gradient of the loss with respect to the stage's
    output."""

    def loss_gradients(
        self, logits_NV: np.ndarray, labels_N: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy of the labels, and its gradient with respect to the
        logits."""
        counted = np.zeros((1, len(labels_N)), np.float32)

        def loss(logits: Any) -> Any:
            return token_loss(logits, labels_N[None], counted).mean

        found, (gradient,) = gradients_of(loss, [logits_NV[None]], np.float32(1))
        return float(found), np.asarray(gradient)[0]

    def head_gradients(
        self, start: int, stop: int, normed_ND: np.ndarray, d_logits_NV: np.ndarray
    ) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of the normed states and of the head's tokens start:stop.

        Args:
            start, stop: one part of `gptj_model.vocabulary.parts`.
            normed_ND: input of the head.
            d_logits_NV: gradient of the logits of these tokens, V = stop - start.
        """
        call, weights = self._head(start, stop)
        sources = [normed_ND[None], *weights]
        _, (d_normed, d_weight, d_bias) = gradients_of(call, sources, d_logits_NV[None])
        d_weight = np.asarray(d_weight)
        if not self.config.tie_word_embeddings:
            d_weight = d_weight.T
        return np.asarray(d_normed)[0], {
            HEAD_WEIGHT.hf: d_weight,
            HEAD_BIAS.hf: np.asarray(d_bias),
        }

    def final_norm_gradients(
        self, x_ND: np.ndarray, d_normed_ND: np.ndarray
    ) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of the hidden states and of the final norm's weights."""
        layer = self._loaded_norm()
        names = [t.hf for t in final_norm(self.config)]
        d_x, *d_weights = _backwards(layer, x_ND, d_normed_ND)
        return d_x, dict(zip(names, d_weights, strict=True))

    def block_gradients(
        self, x_BTD: np.ndarray, positions_BT: np.ndarray, d_out_BTD: np.ndarray
    ) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of the hidden states and of the loaded block's weights."""
        resident = self._resident
        context = resident.context(x_BTD, positions_BT, None)
        tensors = {t.hf: t for t in block(self.config, resident.number)}

        def run(x: Any, *weights: Any) -> Any:
            return self._call(weights, x, context)[0]

        _, (d_x, *d_weights) = gradients_of(run, [x_BTD, *resident.weights], d_out_BTD)
        found = {}
        for tensor, gradient in zip(tensors.values(), d_weights, strict=True):
            op: Op = tensor.op(Scheme.KERAS, Scheme.HF)
            found[tensor.hf] = op(np.asarray(gradient))
        return np.asarray(d_x), found

    def embedding_gradients(
        self, ids_N: np.ndarray, d_x_ND: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct tokens (U,), and the gradients of their rows (U, D)."""
        unique_U, where_N = np.unique(ids_N, return_inverse=True)
        shape_UD = len(unique_U), d_x_ND.shape[1]
        found = _embedding_gradient(shape_UD, where_N, d_x_ND)
        return unique_U, found


def _backwards(layer: keras.Layer, x: np.ndarray, d_out: np.ndarray) -> list[np.ndarray]:
    """Return the gradient of the input, then of each trainable variable."""
    variables = layer.trainable_variables

    def run(x: Any, *weights: Any) -> Any:
        with keras.StatelessScope(list(zip(variables, weights, strict=True))):
            return layer(x)

    _, found = gradients_of(run, [x, *(v.value for v in variables)], d_out)
    return [np.asarray(gradient) for gradient in found]


def _embedding_gradient(
    shape_UD: tuple[int, int], where_N: np.ndarray, d_x_ND: np.ndarray
) -> np.ndarray:
    """Return the gradient of the rows that were looked up, float32."""

    def look_up(rows: Any) -> Any:
        return ops.take(rows, where_N, axis=0)

    _, (found,) = gradients_of(look_up, [np.zeros(shape_UD, np.float32)], d_x_ND)
    if not hasattr(found, "indices"):
        return np.asarray(found)
    # TensorFlow returns one row per token, and the row index it belongs to.
    gradient = np.zeros(shape_UD, np.float32)
    np.add.at(gradient, np.asarray(found.indices), np.asarray(found.values))
    return gradient


def gradients_of(
    function: Callable[..., Any], sources: Sequence[Any], d_out: Any
) -> tuple[Any, Sequence[Any]]:
    """Return a function's result, and the gradient of each argument; zeros where the result does
    not depend on it.

    Args:
        function: function of the sources.
        sources: arrays.
        d_out: gradient of the result.
    """
    values = [ops.convert_to_tensor(source) for source in sources]
    upstream = ops.convert_to_tensor(d_out)
    if keras.backend.backend() == "jax":
        import jax

        out, pull = jax.vjp(function, *values)
        return out, pull(upstream)
    import tensorflow as tf

    tape: Any = tf.GradientTape()
    with tape:
        tape.watch(values)
        out = function(*values)
    found = tape.gradient(out, values, output_gradients=upstream, unconnected_gradients="zero")
    return out, found
