"""Gradients of a GPT-J that is run one block at a time: its stages in reverse.

Shape suffixes: N tokens, B batch, T time, D hidden, V vocabulary, U distinct tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from gptj_model.errors import UsageError
from gptj_model.network.loss import token_loss
from gptj_model.op import Op
from gptj_model.streaming.forward import StreamedModel
from gptj_model.tensors import HEAD_BIAS, HEAD_WEIGHT, Scheme, block, final_norm

Gradients = dict[str, np.ndarray]
"""Gradients by HF name, float32, in HF's layout."""


class StreamedGradients(StreamedModel):
    """The stages in reverse: each takes the gradient of the loss with respect to the stage's
    output.

    Raises:
        UsageError: Keras runs on a backend other than TensorFlow.
    """

    def loss_gradients(
        self, logits_NV: np.ndarray, labels_N: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy of the labels, and its gradient with respect to the
        logits."""
        logits = ops.convert_to_tensor(logits_NV[None])
        with _tape() as tape:
            tape.watch(logits)
            loss = token_loss(logits, labels_N[None], np.zeros((1, len(labels_N)), np.float32)).mean
        return float(loss), np.asarray(tape.gradient(loss, logits))[0]

    def head_gradients(
        self, start: int, stop: int, normed_ND: np.ndarray, d_logits_NV: np.ndarray
    ) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of the normed states and of the head's tokens start:stop.

        Args:
            start, stop: one part of `gptj_model.vocabulary.parts`.
            normed_ND: input of the head.
            d_logits_NV: gradient of the logits of these tokens, V = stop - start.
        """
        part, (weight, bias) = self._head(start, stop)
        normed = ops.convert_to_tensor(normed_ND[None])
        with _tape() as tape:
            tape.watch([normed, weight, bias])
            out = part(normed)
        d_normed, d_weight, d_bias = _pull(tape, out, [normed, weight, bias], d_logits_NV[None])
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
        sources = [ops.convert_to_tensor(x_BTD), *resident.weights]
        with _tape() as tape:
            tape.watch(sources)
            out = resident.call(sources[0], context)
        d_x, *d_weights = _pull(tape, out, sources, d_out_BTD)
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
        rows = ops.zeros(shape_UD)
        with _tape() as tape:
            tape.watch(rows)
            x = ops.take(rows, where_N, axis=0)
        slices = _pull(tape, x, rows, d_x_ND)
        # TensorFlow returns one row per token, and the row index it belongs to.
        gradient = np.zeros(shape_UD, np.float32)
        np.add.at(gradient, np.asarray(slices.indices), np.asarray(slices.values))
        return unique_U, gradient


def _backwards(layer: keras.Layer, x: np.ndarray, d_out: np.ndarray) -> list[np.ndarray]:
    """Return the gradient of the input, then of each trainable variable."""
    value = ops.convert_to_tensor(x)
    with _tape() as tape:
        tape.watch(value)
        out = layer(value)
    weights = [v.value for v in layer.trainable_variables]
    found: Sequence[Any] = _pull(tape, out, [value, *weights], d_out)
    return [np.asarray(gradient) for gradient in found]


def _tape() -> Any:
    if keras.backend.backend() != "tensorflow":
        raise UsageError(
            f"Keras runs on {keras.backend.backend()}, expected TensorFlow to compare gradients",
            hint="unset KERAS_BACKEND",
        )
    import tensorflow as tf

    return tf.GradientTape()


def _pull(tape: Any, out: Any, sources: Any, d_out: np.ndarray) -> Any:
    """Return the gradients of the sources; zeros where `out` does not depend on one."""
    d_out_tensor = ops.convert_to_tensor(d_out)
    return tape.gradient(out, sources, output_gradients=d_out_tensor, unconnected_gradients="zero")
