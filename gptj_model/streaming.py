"""GPT-J run one block at a time from a weight source: memory for one block, not for the model.

Shape suffixes: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

from gptj_model.config import GPTJConfig
from gptj_model.layers import Block, Head, layer_norm
from gptj_model.model import make_context
from gptj_model.source import TensorSource, read_rows
from gptj_model.tensors import Scheme, block, embedding, head
from gptj_model.vocabulary import parts, read_head
from gptj_model.weights import assign, assigned_variables


class StreamedModel:
    """The stages of a forward pass in float32, each with numpy arrays in and out.

    Call `embed` for every input, then for each block `load_block` once and `run_block` for every
    state, then `logits` once for all states.
    """

    def __init__(self, config: GPTJConfig, source: TensorSource, scheme: Scheme) -> None:
        self._config = config
        self._source = source
        self._scheme = scheme
        hidden_shape = (None, None, config.n_embd)
        self._block = Block(config, keras.random.SeedGenerator(0), name="h_0")
        self._block.build(hidden_shape)
        self._run = _compiled(self._block)

    def embed(self, ids_BT: np.ndarray) -> np.ndarray:
        """Rows of the embedding, read one by one: (B, T, D)."""
        (name,) = embedding(self._config).names(self._scheme)
        unique, where = np.unique(ids_BT, return_inverse=True)
        rows = [read_rows(self._source, name, int(i), int(i) + 1)[0] for i in unique]
        return np.stack(rows).astype(np.float32)[where.reshape(ids_BT.shape)]

    def load_block(self, i: int) -> None:
        """Make block `i` the resident one."""
        variables = assigned_variables(
            self._block, {t.hf: t for t in block(self._config, 0)}, prefix=""
        )
        for variable, tensor in zip(variables.values(), block(self._config, i), strict=True):
            assign(variable, tensor, self._source, self._scheme)

    def run_block(self, x_BTD: np.ndarray, positions_T: np.ndarray) -> np.ndarray:
        """The resident block applied to whole sequences at these positions: (B, T, D)."""
        T = x_BTD.shape[1]
        context = make_context(self._config, T, T, positions_T[None].astype(np.int32))
        return np.asarray(self._run(ops.convert_to_tensor(x_BTD), context))

    def logits(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Hidden states (B, T, D) after the last block → (B, T, V) each.

        The head is read a part of the vocabulary at a time, in place of the block.
        """
        del self._block, self._run
        config = self._config
        ln_f = layer_norm(config, "ln_f", "float32")
        ln_f.build((None, None, config.n_embd))
        rows = {t.hf: t for t in head(config) if t.keras.startswith("ln_f/")}
        for hf_name, variable in assigned_variables(ln_f, rows, prefix="").items():
            assign(variable, rows[hf_name], self._source, self._scheme)
        normed = [ln_f(x_BTD) for x_BTD in states]
        found = [np.empty((*x.shape[:2], config.vocab_size), np.float32) for x in states]
        for start, stop in parts(config):
            part = self._head(start, stop)
            for h_BTD, logits_BTV in zip(normed, found, strict=True):
                logits_BTV[..., start:stop] = np.asarray(part(h_BTD))
        return found

    def _head(self, start: int, stop: int) -> Callable[[Any], Any]:
        """The head as a function of normed hidden states, for tokens start:stop."""
        weight_VD, bias_V = read_head(self._config, self._source, self._scheme, start, stop)
        weight_VD, bias_V = (x.astype(np.float32, copy=False) for x in (weight_VD, bias_V))
        ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
        layer = Head(replace(self._config, vocab_size=stop - start, **ends), name="lm_head")
        layer.build((None, None, self._config.n_embd))
        layer.bias.assign(bias_V)
        if layer.kernel is None:
            embeddings_VD = ops.convert_to_tensor(weight_VD)
            return lambda h_BTD: layer(h_BTD, embeddings_VD)
        layer.kernel.assign(weight_VD.T)
        return lambda h_BTD: layer(h_BTD, None)


def _compiled(layer: Block):
    """The block as one function of (x, context), compiled where the backend is TensorFlow."""

    def run(x_BTD, context):
        return layer(x_BTD, context)[0]

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(run, reduce_retracing=True)
    return run
