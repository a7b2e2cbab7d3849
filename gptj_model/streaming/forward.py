"""GPT-J run one block at a time from a weight source: memory for one block, not for the model.

Shape suffixes: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import keras
import numpy as np
from keras import ops

from gptj_model.config import GPTJConfig
from gptj_model.network.layers import Block, Cache, Context, Head, layer_norm
from gptj_model.network.loss import RunningLoss, TokenLoss
from gptj_model.network.model import make_context
from gptj_model.network.observation import observing
from gptj_model.network.weights import assign, assigned_variables
from gptj_model.page_buffers import page_memory
from gptj_model.source import TensorSource, read_rows
from gptj_model.streaming.block_buffers import BlockMemory
from gptj_model.streaming.prefetch import blocks_ahead
from gptj_model.streaming.residency import NOTHING_KEPT, Kept
from gptj_model.tensors import FINAL_NORM, HEAD_WEIGHT, Scheme, block, embedding, final_norm
from gptj_model.transposition import transpose
from gptj_model.vocabulary import PART, parts, read_head

AnyLayer = TypeVar("AnyLayer", bound=keras.Layer)


class StreamedModel:
    """The stages of a forward pass in float32, each with numpy arrays in and out.

    Args:
        config: of the model.
        source: of its weights, by the names of `scheme`.
        scheme: see there.
        kept: what stays in memory once it was read.
        memory: that blocks of such a source are read into; None: of its own.

    Call `embed` for every input, then for each of `blocks` `run_block` for every state,
    `drop_block`, then `final_norm` and `logits` once for all states.
    """

    def __init__(
        self,
        config: GPTJConfig,
        source: TensorSource,
        scheme: Scheme,
        *,
        kept: Kept = NOTHING_KEPT,
        memory: BlockMemory | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self._scheme = scheme
        self._kept = kept
        self._memory = memory or BlockMemory(config, scheme, source.tensors)
        seeds = keras.random.SeedGenerator(0)
        self._block = _without_values(lambda: Block(config, seeds, name="h_0"), config.n_embd)
        rows = {t.hf: t for t in block(config, 0)}
        self._variables = list(assigned_variables(self._block, rows, prefix="").values())
        self._run = _compiled(self._call)
        self._resident = -1
        self._weights: list[Any] = []
        self._kept_blocks: dict[int, list[Any]] = {}
        self._head_layer = cache(partial(_head_layer, config))
        self._part_bytes = 4 * min(PART, config.vocab_size) * config.n_embd
        self._head_memory = self._memory.between_blocks(self._part_bytes)
        self._kept_head: dict[int, tuple[Callable[[Any], Any], tuple[Any, Any]]] = {}

    def embed(self, ids_BT: np.ndarray) -> np.ndarray:
        """Rows of the embedding, read one by one: (B, T, D)."""
        name = embedding(self.config).name(self._scheme)
        unique, where = np.unique(ids_BT, return_inverse=True)
        rows = [read_rows(self.source, name, int(i), int(i) + 1)[0] for i in unique]
        return np.stack(rows).astype(np.float32)[where.reshape(ids_BT.shape)]

    def blocks(self) -> Iterator[int]:
        """Make each block in turn the resident one; the next one to read is read meanwhile."""
        numbers = range(self.config.n_layer)
        missing = [i for i in numbers if i not in self._kept_blocks]
        loaded = blocks_ahead(self._read_block, missing, self._load)
        for i in numbers:
            if i in missing:
                next(loaded)
            else:
                self._resident, self._weights = i, self._kept_blocks[i]
            yield i

    def load_block(self, i: int) -> None:
        """Make block `i` the resident one."""
        self._load((i, self._memory.read(self.source, i, over=True)))

    def _read_block(self, i: int) -> tuple[int, list[np.ndarray]]:
        """Its number, and its weights as they are stored."""
        return i, self._memory.read(self.source, i)

    def _load(self, stored: tuple[int, list[np.ndarray]]) -> None:
        self._resident, values = stored
        keeps = self._kept.keeps(self._resident, self.config.n_layer)
        weights = self._memory.lay_out(self._resident, values, own=keeps)
        self._weights = [_tensor(w) for w in weights]
        if keeps:
            self._kept_blocks[self._resident] = self._weights

    def _call(
        self, weights: Sequence[Any], x_BTD: Any, context: Context, cache: Cache | None = None
    ) -> tuple[Any, Any]:
        """The block with these weights: hidden states, and the cache if there was one."""
        with _scope(self._variables, weights):
            return self._block(x_BTD, context, cache)

    def run_block(
        self, x_BTD: np.ndarray, positions_BT: np.ndarray, real_BT: np.ndarray | None = None
    ) -> np.ndarray:
        """The resident block applied to whole sequences: (B, T, D).

        Args:
            x_BTD: hidden states.
            positions_BT: int32.
            real_BT: False at padding, which no token sees; None: there is none.
        """
        context = self._context(x_BTD, positions_BT, real_BT)
        out_BTD, _ = self._run(self._weights, ops.convert_to_tensor(x_BTD), context)
        return np.asarray(out_BTD)

    def run_block_cached(
        self,
        x_BTD: np.ndarray,
        positions_BT: np.ndarray,
        cache: Cache,
        start: int,
        visible_BS: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Cache]:
        """The resident block applied to tokens start … start + T of sequences.

        Args:
            x_BTD: hidden states of these tokens.
            positions_BT: int32, theirs.
            cache: what `empty_cache` or the last call for this block and these sequences gave.
            start: number of tokens already in the cache.
            visible_BS: False at what no token may see, S the cache's length; None: all may.
        """
        T, S = x_BTD.shape[1], cache[0].shape[2]
        context = make_context(self.config, T, S, positions_BT, visible_BS, start)
        out_BTD, cache = self._call(self._weights, ops.convert_to_tensor(x_BTD), context, cache)
        return np.asarray(out_BTD), cache

    def empty_cache(self, batch: int, length: int) -> Cache:
        """The cache of one block, for sequences of up to `length` tokens."""
        shape = (batch, self.config.n_head, length, self.config.head_dim)
        return ops.zeros(shape, "float32"), ops.zeros(shape, "float32")

    def operations(
        self, x_BTD: np.ndarray, positions_BT: np.ndarray, real_BT: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """What each of `observation.OPERATIONS` of the resident block gives; see `run_block`."""
        context = self._context(x_BTD, positions_BT, real_BT)
        with observing() as seen:
            self._call(self._weights, ops.convert_to_tensor(x_BTD), context)
        return {name: np.asarray(value) for name, value in seen.items()}

    def drop_block(self) -> None:
        """Free the resident block's memory; none can be loaded again."""
        (self._head_memory,) = page_memory(1, self._part_bytes)
        del self._block, self._run, self._variables, self._weights, self._memory

    def final_norm(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Hidden states (B, T, D) after the last block, normed."""
        layer = self._loaded_norm()
        return [np.asarray(layer(x_BTD)) for x_BTD in states]

    def _loaded_norm(self) -> keras.layers.LayerNormalization:
        config = self.config
        layer = layer_norm(config, FINAL_NORM[0].layer, "float32")
        layer.build((None, None, config.n_embd))
        rows = {t.hf: t for t in final_norm(config)}
        for hf_name, variable in assigned_variables(layer, rows, prefix="").items():
            assign(variable, rows[hf_name], self.source, self._scheme)
        return layer

    def logits(self, normed: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Normed hidden states (B, T, D) → (B, T, V) each, a part of the vocabulary at a time."""
        found = [np.empty((*x.shape[:2], self.config.vocab_size), np.float32) for x in normed]
        for start, stop in parts(self.config):
            part, _ = self._head(start, stop)
            for h_BTD, logits_BTV in zip(normed, found, strict=True):
                logits_BTV[..., start:stop] = np.asarray(part(ops.convert_to_tensor(h_BTD)))
        return found

    def losses(
        self, normed: Sequence[np.ndarray], targets: Sequence[tuple[Any, Any]]
    ) -> list[TokenLoss]:
        """The loss of each batch from its normed hidden states (B, T, D), without its logits.

        Args:
            normed: what `final_norm` gave.
            targets: of each batch, 1 on ignored tokens and the labels, both (B, T).
        """
        found = [RunningLoss(np.asarray(labels).reshape(-1)) for _, labels in targets]
        for start, stop in parts(self.config):
            part, _ = self._head(start, stop)
            for h_BTD, loss in zip(normed, found, strict=True):
                for row, h_TD in enumerate(h_BTD):
                    logits_BTV = part(ops.convert_to_tensor(h_TD[None]))
                    loss.add(np.asarray(logits_BTV)[0], row * len(h_TD), start)
        return [
            loss.sums(np.asarray(ignored).reshape(-1))
            for loss, (ignored, _) in zip(found, targets, strict=True)
        ]

    def _head(self, start: int, stop: int) -> tuple[Callable[[Any], Any], tuple[Any, Any]]:
        """The head as a function of normed hidden states, for tokens start:stop; and its weight,
        (D, V) or tied to the embedding (V, D), and bias."""
        if start in self._kept_head:
            return self._kept_head[start]
        found = self._read_head(start, stop)
        if self._kept.head:
            self._kept_head[start] = found
        return found

    def _read_head(self, start: int, stop: int) -> tuple[Callable[[Any], Any], tuple[Any, Any]]:
        stored_VD, bias_V = read_head(self.config, self.source, self._scheme, start, stop)
        tied = self.config.tie_word_embeddings
        self._weights = []  # of the block whose place this is
        memory = page_memory(1, self._part_bytes)[0] if self._kept.head else self._head_memory
        shape = stored_VD.shape if tied else stored_VD.shape[::-1]
        values = memory[: 4 * stored_VD.size].view(np.float32).reshape(shape)
        if tied:
            np.copyto(values, stored_VD, casting="unsafe")
        else:
            transpose(values, stored_VD)
        weight, bias = _tensor(values), ops.convert_to_tensor(bias_V.astype(np.float32))
        layer = self._head_layer(stop - start)

        def run(h_BTD: Any) -> Any:
            if tied:
                with _scope([layer.bias], [bias]):
                    return layer(h_BTD, weight)
            with _scope([layer.kernel, layer.bias], [weight, bias]):
                return layer(h_BTD, None)

        return run, (weight, bias)

    def _context(self, x_BTD: np.ndarray, positions_BT: np.ndarray, real_BT: np.ndarray | None):
        T = x_BTD.shape[1]
        return make_context(self.config, T, T, positions_BT.astype(np.int32), real_BT)


def _head_layer(config: GPTJConfig, size: int) -> Head:
    """The head for so many tokens."""
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    part = replace(config, vocab_size=size, **ends)
    return _without_values(lambda: Head(part, name=HEAD_WEIGHT.layer), config.n_embd)


def _without_values(make: Callable[[], AnyLayer], width: int) -> AnyLayer:
    """A layer for hidden states, whose variables have no values but within `_scope`."""
    with keras.StatelessScope(initialize_variables=False):
        layer = make()
        layer.build((None, None, width))
    return layer


def _scope(variables: Sequence[Any], values: Sequence[Any]) -> keras.StatelessScope:
    """Within it the variables have these values."""
    pairs = list(zip(variables, values, strict=True))
    return keras.StatelessScope(pairs, initialize_variables=False)


def _tensor(values: np.ndarray) -> Any:
    """It may share the memory of the array; see `shared_tensor`."""
    if keras.backend.backend() == "tensorflow":
        from gptj_model.streaming.shared_tensor import shared_tensor

        return shared_tensor(values)
    return ops.convert_to_tensor(values)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled where the backend is TensorFlow."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True)
    return function
