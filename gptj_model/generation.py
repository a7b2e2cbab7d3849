"""Continuing a prompt: cached decoding, greedy or sampled.

Shape suffixes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import keras
import numpy as np
from keras import ops

from gptj_model.errors import UsageError
from gptj_model.model import GPTJ
from gptj_model.streaming import StreamedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 takes the most likely token; 1 samples the model's own distribution."""
    top_k: int = 0
    """Sample among so many most likely tokens; 0 among all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    seed: int = 0


class Decoder(Protocol):
    """A model that has read some tokens, and is given more."""

    def __call__(self, ids_BT: np.ndarray) -> np.ndarray:
        """Read on by these tokens, B = 1; logits (V,) of the one that follows."""
        ...


class ResidentDecoder:
    """A model in memory.

    Args:
        model: with its weights loaded.
        length: tokens that are read and written, at most.
    """

    def __init__(self, model: GPTJ, length: int) -> None:
        self._step = _compiled(model)
        self._caches = model.empty_caches(1, length)
        self._start = 0

    def __call__(self, ids_BT: np.ndarray) -> np.ndarray:
        """See `Decoder`."""
        start = ops.convert_to_tensor(self._start, dtype="int32")
        logits_V, self._caches = self._step(ops.convert_to_tensor(ids_BT), self._caches, start)
        self._start += ids_BT.shape[1]
        return np.asarray(logits_V)


class StreamedDecoder:
    """A model that is read once a token, block by block; only the caches stay in memory.

    Args:
        model: see `StreamedModel`.
        length: tokens that are read and written, at most.
    """

    def __init__(self, model: StreamedModel, length: int) -> None:
        self._model = model
        self._caches = [model.empty_cache(1, length) for _ in range(model.config.n_layer)]
        self._start = 0

    def __call__(self, ids_BT: np.ndarray) -> np.ndarray:
        """See `Decoder`."""
        T = ids_BT.shape[1]
        positions_BT = np.arange(self._start, self._start + T, dtype=np.int32)[None]
        x_BTD = self._model.embed(ids_BT)
        for i, cache in enumerate(self._caches):
            self._model.load_block(i)
            x_BTD, self._caches[i] = self._model.run_block_cached(
                x_BTD, positions_BT, cache, self._start
            )
        self._start += T
        (logits_BTV,) = self._model.logits(self._model.final_norm([x_BTD[:, -1:]]))
        return logits_BTV[0, 0]


def generate(
    model: GPTJ | StreamedModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop_at: int | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, one by one.

    Args:
        model: with its weights loaded, or read for every token.
        prompt: token ids, at least one.
        max_new_tokens: how many to yield at most.
        sampling: how each is chosen.
        stop_at: a token id that ends the text and is not yielded, such as end-of-text.

    Raises:
        UsageError: an id outside the vocabulary, or prompt and continuation too long together.
    """
    config = model.config
    length = len(prompt) + max_new_tokens
    if not prompt:
        raise UsageError("the prompt is empty, expected at least one token")
    outside = [i for i in prompt if not 0 <= i < config.vocab_size]
    if outside:
        raise UsageError(
            f"the prompt holds the id {outside[0]}, expected 0 to {config.vocab_size - 1}"
        )
    if length > config.n_positions:
        raise UsageError(
            f"prompt and continuation are {length} tokens, "
            f"expected at most the model's {config.n_positions}"
        )
    decoder = StreamedDecoder if isinstance(model, StreamedModel) else ResidentDecoder
    read: Decoder = decoder(model, length)  # pyright: ignore[reportArgumentType]
    random = np.random.default_rng(sampling.seed)
    ids_BT = np.asarray([prompt], np.int32)
    for _ in range(max_new_tokens):
        token = choose(read(ids_BT), sampling, random)
        if token == stop_at:
            return
        yield token
        ids_BT = np.asarray([[token]], np.int32)


def choose(logits_V: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """One token id from float logits of shape (V,)."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled = logits_V.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(scaled[order] - scaled[order[0]])
    p /= p.sum()
    # The token that crosses the threshold stays, so there is always one.
    kept = np.cumsum(p) - p < sampling.top_p
    p = p[kept] / p[kept].sum()
    return int(random.choice(order[kept], p=p))


def _compiled(model: GPTJ):
    """One decoding step, compiled where the backend is TensorFlow: logits of the last token."""

    def step(ids_BT, caches, start):
        logits_BTV, caches = model.call_cached(ids_BT, caches, start, last=True)
        return logits_BTV[0, 0], caches

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(step, reduce_retracing=True)
    return step
