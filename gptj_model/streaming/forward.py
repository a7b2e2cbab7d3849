"""GPT-J run one block at a time from a weight source, in the memory of one block.

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
from gptj_model.page_buffers import page_buffers
from gptj_model.source import TensorSource
from gptj_model.streaming.block_buffers import BlockBuffers
from gptj_model.streaming.prefetch import prefetch_blocks
from gptj_model.streaming.residency import NOTHING_RESIDENT, Residency
from gptj_model.tensors import FINAL_NORM, HEAD_WEIGHT, Scheme, block, final_norm
from gptj_model.transposition import transpose
from gptj_model.vocabulary import PART, parts, read_embeddings, read_head

AnyLayer = TypeVar("AnyLayer", bound=keras.Layer)


class BlockPass:
    """One block with its weights in memory, until the next block is loaded.

    Hidden states are float32 numpy arrays of shape (B, T, D), in and out.

    Args:
        number: index of the block in the model.
        weights: its weights in the order of `tensors.block`.
        call: the block as a function of weights, states, context and cache.
        compiled: the same function, compiled for whole sequences.
        config: configuration of the model.
    """

    def __init__(
        self,
        number: int,
        weights: Sequence[Any],
        call: Callable[..., tuple[Any, Any]],
        compiled: Callable[..., tuple[Any, Any]],
        config: GPTJConfig,
    ) -> None:
        self.number = number
        self._weights: Sequence[Any] | None = weights
        self._call = call
        self._compiled = compiled
        self._config = config

    def end(self) -> None:
        """Give up the weights, whose memory the next block takes."""
        self._weights = None

    @property
    def weights(self) -> Sequence[Any]:
        """Weights of the block, in the order of `tensors.block`.

        Raises:
            RuntimeError: another block has taken their memory.
        """
        if self._weights is None:
            raise RuntimeError(f"block {self.number} is no longer in memory")
        return self._weights

    def run(
        self, x_BTD: np.ndarray, positions_BT: np.ndarray, real_BT: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the hidden states after the block, for whole sequences.

        Args:
            x_BTD: hidden states before the block.
            positions_BT: int32 position of each token.
            real_BT: False at padding, which no token attends to; None means no padding.
        """
        context = self.context(x_BTD, positions_BT, real_BT)
        out_BTD, _ = self._compiled(self.weights, ops.convert_to_tensor(x_BTD), context)
        return np.asarray(out_BTD)

    def run_cached(
        self,
        x_BTD: np.ndarray,
        positions_BT: np.ndarray,
        cache: Cache,
        start: int,
        visible_BS: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Cache]:
        """Return the hidden states after the block for tokens start … start + T, and the cache.

        Args:
            x_BTD: hidden states of these tokens before the block.
            positions_BT: int32 position of each of these tokens.
            cache: cache of this block and these sequences, from `StreamedModel.empty_cache` or
                from the previous call.
            start: number of tokens already in the cache.
            visible_BS: False at tokens that none may attend to, S being the cache's length; None
                means that all are visible.
        """
        T, S = x_BTD.shape[1], cache[0].shape[2]
        context = make_context(self._config, T, S, positions_BT, visible_BS, start)
        out_BTD, cache = self._call(self.weights, ops.convert_to_tensor(x_BTD), context, cache)
        return np.asarray(out_BTD), cache

    def operations(
        self, x_BTD: np.ndarray, positions_BT: np.ndarray, real_BT: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Return the result of each of `observation.OPERATIONS`; the arguments are those of
        `run`."""
        context = self.context(x_BTD, positions_BT, real_BT)
        with observing() as seen:
            self._call(self.weights, ops.convert_to_tensor(x_BTD), context)
        return {name: np.asarray(value) for name, value in seen.items()}

    def context(
        self, x_BTD: np.ndarray, positions_BT: np.ndarray, real_BT: np.ndarray | None
    ) -> Context:
        """Return rotary angles and mask of whole sequences."""
        T = x_BTD.shape[1]
        return make_context(self._config, T, T, positions_BT.astype(np.int32), real_BT)


class HeadPass:
    """What follows the blocks: final norm, logits and losses, a part of the vocabulary at a time.

    Args:
        norm: returns the final layer norm with its weights.
        part: returns the head for tokens start:stop as a function of normed hidden states.
        config: configuration of the model.
    """

    def __init__(
        self,
        norm: Callable[[], keras.layers.LayerNormalization],
        part: Callable[[int, int], Callable[[Any], Any]],
        config: GPTJConfig,
    ) -> None:
        self._norm = norm
        self._part = part
        self._config = config

    def normed(self, states: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return hidden states (B, T, D) after the last block, normed."""
        layer = self._norm()
        return [np.asarray(layer(x_BTD)) for x_BTD in states]

    def logits(self, normed: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return float32 logits (B, T, V) of normed hidden states (B, T, D)."""
        found = [np.empty((*x.shape[:2], self._config.vocab_size), np.float32) for x in normed]
        for start, stop in parts(self._config):
            part = self._part(start, stop)
            for h_BTD, logits_BTV in zip(normed, found, strict=True):
                logits_BTV[..., start:stop] = np.asarray(part(ops.convert_to_tensor(h_BTD)))
        return found

    def losses(
        self, normed: Sequence[np.ndarray], targets: Sequence[tuple[Any, Any]]
    ) -> list[TokenLoss]:
        """Return the loss of each batch without holding its logits.

        Args:
            normed: normed hidden states (B, T, D) of each batch.
            targets: for each batch 1 on ignored tokens, and the labels, both (B, T).
        """
        found = self._running(normed, [labels for _, labels in targets])
        return [
            loss.sums(np.asarray(ignored).reshape(-1))
            for loss, (ignored, _) in zip(found, targets, strict=True)
        ]

    def likelihoods(
        self, normed: Sequence[np.ndarray], labels: Sequence[np.ndarray]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return how likely tokens are, without holding their logits.

        Args:
            normed: normed hidden states (1, N, D) before these tokens, of each batch.
            labels: int32 ids of the tokens, (N,) of each batch.

        Returns:
            For each batch the log-probability of every token, float64 (N,), and whether it is the
            most likely one, bool (N,).
        """
        return [(loss.logprobs_N, loss.hits_N) for loss in self._running(normed, labels)]

    def _running(self, normed: Sequence[np.ndarray], labels: Sequence[Any]) -> list[RunningLoss]:
        """Return the losses of each batch, after every part of the vocabulary."""
        found = [RunningLoss(np.asarray(own).reshape(-1)) for own in labels]
        most = self._config.n_positions  # tokens whose logits are held at once
        for start, stop in parts(self._config):
            part = self._part(start, stop)
            for h_BTD, loss in zip(normed, found, strict=True):
                for row, h_TD in enumerate(h_BTD):
                    for at in range(0, len(h_TD), most):
                        logits_BTV = part(ops.convert_to_tensor(h_TD[None, at : at + most]))
                        loss.add(np.asarray(logits_BTV)[0], row * len(h_TD) + at, start)
        return found


class StreamedModel:
    """The stages of a forward pass in float32, each with numpy arrays in and out.

    `embed` gives the first hidden states, each of `blocks` (or `load_block`) takes them one block
    further, and `head` turns the last ones into logits or losses.

    Args:
        config: configuration of the model.
        source: weights, under the names of `scheme`.
        scheme: naming scheme and layout of the source.
        kept: blocks and head that stay in memory once they are read.
        memory: buffers that the blocks are read into; None means buffers of its own.
    """

    def __init__(
        self,
        config: GPTJConfig,
        source: TensorSource,
        scheme: Scheme,
        *,
        kept: Residency = NOTHING_RESIDENT,
        memory: BlockBuffers | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self._scheme = scheme
        self._kept = kept
        self._memory = memory or BlockBuffers(config, scheme, source.tensors)
        seeds = keras.random.SeedGenerator(0)
        self._block = _without_values(lambda: Block(config, seeds, name="h_0"), config.n_embd)
        rows = {t.hf: t for t in block(config, 0)}
        self._variables = list(assigned_variables(self._block, rows, prefix="").values())
        self._run = _compiled(self._call)
        self._resident = BlockPass(-1, [], self._call, self._run, config)
        self._kept_blocks: dict[int, list[Any]] = {}
        self._head_layer = cache(partial(_head_layer, config))
        self._part_bytes = 4 * min(PART, config.vocab_size) * config.n_embd
        self._head_memory = self._memory.between_blocks(self._part_bytes)
        self._kept_head: dict[int, tuple[Callable[..., Any], tuple[Any, Any]]] = {}

    def embed(self, ids_BT: np.ndarray) -> np.ndarray:
        """Return the embeddings of token ids, float32 (B, T, D); only their rows are read."""
        rows_BTD = read_embeddings(self.config, self.source, self._scheme, ids_BT)
        return rows_BTD.astype(np.float32)

    def blocks(self) -> Iterator[BlockPass]:
        """Yield each block in turn, while the next one is read from the source."""
        numbers = range(self.config.n_layer)
        missing = [i for i in numbers if i not in self._kept_blocks]
        loaded = prefetch_blocks(self._read_block, missing, self._load)
        for i in numbers:
            if i in missing:
                next(loaded)
            else:
                self._begin(i, self._kept_blocks[i])
            yield self._resident

    def load_block(self, i: int) -> BlockPass:
        """Read block `i`, and return it; it takes the place of the block before."""
        self._load((i, self._memory.read(self.source, i, over=True)))
        return self._resident

    def _read_block(self, i: int) -> tuple[int, list[np.ndarray]]:
        """Return the number of a block, and its weights as they are stored."""
        return i, self._memory.read(self.source, i)

    def _load(self, stored: tuple[int, list[np.ndarray]]) -> None:
        i, values = stored
        keeps = self._kept.keeps(i, self.config.n_layer)
        weights = [_tensor(w) for w in self._memory.lay_out(i, values, own=keeps)]
        if keeps:
            self._kept_blocks[i] = weights
        self._begin(i, weights)

    def _begin(self, i: int, weights: list[Any]) -> None:
        self._resident.end()
        self._resident = BlockPass(i, weights, self._call, self._run, self.config)

    def _call(
        self, weights: Sequence[Any], x_BTD: Any, context: Context, cache: Cache | None = None
    ) -> tuple[Any, Any]:
        """Return hidden states after a block with these weights, and its cache if there is one."""
        with _scope(self._variables, weights):
            return self._block(x_BTD, context, cache)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Return the cache of one block, for sequences of up to `length` tokens."""
        shape = (batch, self.config.n_head, length, self.config.head_dim)
        return ops.zeros(shape, "float32"), ops.zeros(shape, "float32")

    def head(self, *, last: bool = False) -> HeadPass:
        """Return what follows the blocks.

        Args:
            last: whether no block is loaded afterwards, so that the memory of blocks is freed.
        """
        if last:
            self._resident.end()
            (self._head_memory,) = page_buffers(1, self._part_bytes)
            del self._block, self._run, self._variables, self._memory
        return HeadPass(self._loaded_norm, self._part, self.config)

    def _part(self, start: int, stop: int) -> Callable[[Any], Any]:
        """Return the head for tokens start:stop as a function of normed hidden states."""
        call, weights = self._head(start, stop)
        return lambda h_BTD: call(h_BTD, *weights)

    def _loaded_norm(self) -> keras.layers.LayerNormalization:
        config = self.config
        layer = layer_norm(config, FINAL_NORM[0].layer, "float32")
        layer.build((None, None, config.n_embd))
        rows = {t.hf: t for t in final_norm(config)}
        for hf_name, variable in assigned_variables(layer, rows, prefix="").items():
            assign(variable, rows[hf_name], self.source, self._scheme)
        return layer

    def _head(self, start: int, stop: int) -> tuple[Callable[..., Any], tuple[Any, Any]]:
        """Return the head for tokens start:stop as a function of normed hidden states, weight and
        bias; and these: (D, V) or tied to the embedding (V, D), and (V,)."""
        if start in self._kept_head:
            return self._kept_head[start]
        found = self._read_head(start, stop)
        if self._kept.head:
            self._kept_head[start] = found
        return found

    def _read_head(self, start: int, stop: int) -> tuple[Callable[..., Any], tuple[Any, Any]]:
        stored_VD, bias_V = read_head(self.config, self.source, self._scheme, start, stop)
        tied = self.config.tie_word_embeddings
        self._resident.end()  # the head takes over its buffer
        memory = page_buffers(1, self._part_bytes)[0] if self._kept.head else self._head_memory
        shape = stored_VD.shape if tied else stored_VD.shape[::-1]
        values = memory[: 4 * stored_VD.size].view(np.float32).reshape(shape)
        if tied:
            np.copyto(values, stored_VD, casting="unsafe")
        else:
            transpose(values, stored_VD)
        weight, bias = _tensor(values), ops.convert_to_tensor(bias_V.astype(np.float32))
        layer = self._head_layer(stop - start)

        def run(h_BTD: Any, weight: Any, bias: Any) -> Any:
            if tied:
                with _scope([layer.bias], [bias]):
                    return layer(h_BTD, weight)
            with _scope([layer.kernel, layer.bias], [weight, bias]):
                return layer(h_BTD, None)

        return run, (weight, bias)


def normed_states(
    model: StreamedModel, batches: Sequence[np.ndarray]
) -> tuple[HeadPass, list[np.ndarray]]:
    """Run batches that share one pass over the blocks.

    Args:
        model: the streamed model.
        batches: int32 token ids (B, T) of each batch, padded on the right if at all.

    Returns:
        The head, and for each batch the hidden states (B, T, D) after the final norm.
    """
    states = [model.embed(ids_BT) for ids_BT in batches]
    for each in model.blocks():
        for n, x_BTD in enumerate(states):
            B, T = x_BTD.shape[:2]
            positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
            states[n] = each.run(x_BTD, positions_BT)
    head = model.head()
    for n, x_BTD in enumerate(states):
        (states[n],) = head.normed([x_BTD])
    return head, states


def _head_layer(config: GPTJConfig, size: int) -> Head:
    """Return the head for `size` tokens."""
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    part = replace(config, vocab_size=size, **ends)
    return _without_values(lambda: Head(part, name=HEAD_WEIGHT.layer), config.n_embd)


def _without_values(make: Callable[[], AnyLayer], width: int) -> AnyLayer:
    """Return a layer for hidden states whose variables have values only within `_scope`."""
    with keras.StatelessScope(initialize_variables=False):
        layer = make()
        layer.build((None, None, width))
    return layer


def _scope(variables: Sequence[Any], values: Sequence[Any]) -> keras.StatelessScope:
    """Return a scope in which the variables have these values."""
    pairs = list(zip(variables, values, strict=True))
    return keras.StatelessScope(pairs, initialize_variables=False)


def _tensor(values: np.ndarray) -> Any:
    """Return a tensor that may share the memory of the array; see `shared_tensor`."""
    if keras.backend.backend() == "tensorflow":
        from gptj_model.streaming.shared_tensor import shared_tensor

        return shared_tensor(values)
    return ops.convert_to_tensor(values)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, compiled by the backend."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True, autograph=False)
    import jax

    return jax.jit(function)
