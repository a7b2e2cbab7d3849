"""Continuation of prompts: cached decoding of several at once, greedy or sampled.

Shape suffixes: B batch, T time, S length of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from gptj_model.errors import UsageError
from gptj_model.network.array_type import Tensor
from gptj_model.network.layers import Cache
from gptj_model.network.model import GPTJ
from gptj_model.streaming.forward import StreamedModel

#: Step in which the lengths of caches grow.
CACHE_STEP = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Divisor of the logits; 0 takes the most likely token, 1 samples the model's own
    distribution."""
    top_k: int = 0
    """Number of most likely tokens to sample from; 0 means all."""
    top_p: float = 1.0
    """Probability that the tokens to sample from add up to, the most likely first."""
    repetition_penalty: float = 1.0
    """Divisor of positive logits of tokens already in the text, and factor of negative ones."""
    seed: int = 0
    """Seed of the first prompt; each further prompt takes the next number."""


class Decoder(Protocol):
    """A model that has read some tokens, and takes more."""

    def __call__(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, visible_BS: np.ndarray
    ) -> np.ndarray:
        """Read further tokens.

        Args:
            ids_BT: int32 token ids.
            positions_BT: int32 position of each of these tokens.
            visible_BS: False at tokens that none may attend to, S being the cache's length.

        Returns:
            Logits (B, V) of the next tokens.
        """
        ...


class ResidentDecoder:
    """Decoder of a model in memory.

    Args:
        step: the compiled decoding step of the model.
        caches: empty caches, one per block.
    """

    def __init__(self, step: Any, caches: Any) -> None:
        self._step = step
        self._caches = caches
        self._start = 0

    def __call__(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, visible_BS: np.ndarray
    ) -> np.ndarray:
        """Implement `Decoder`."""
        start = ops.convert_to_tensor(self._start, dtype="int32")
        given = map(ops.convert_to_tensor, (ids_BT, positions_BT, visible_BS))
        logits_BV, self._caches = self._step(*given, self._caches, start)
        self._start += ids_BT.shape[1]
        return np.asarray(logits_BV)


class StreamedDecoder:
    """Decoder of a model that is read block by block, once per token; only the caches stay in
    memory.

    Args:
        model: the streamed model.
        batch: number of prompts.
        length: largest number of tokens per prompt, read and written.
    """

    def __init__(self, model: StreamedModel, batch: int, length: int) -> None:
        self._model = model
        self._caches = [model.empty_cache(batch, length) for _ in range(model.config.n_layer)]
        self._start = 0

    def __call__(
        self, ids_BT: np.ndarray, positions_BT: np.ndarray, visible_BS: np.ndarray
    ) -> np.ndarray:
        """Implement `Decoder`."""
        x_BTD = self._model.embed(ids_BT)
        for block in self._model.blocks():
            i = block.number
            x_BTD, self._caches[i] = block.run_cached(
                x_BTD, positions_BT, self._caches[i], self._start, visible_BS
            )
        self._start += ids_BT.shape[1]
        head = self._model.head()
        (logits_BTV,) = head.logits(head.normed([x_BTD[:, -1:]]))
        return logits_BTV[:, 0]


class Generator:
    """Continuation of prompts with one model, compiled once.

    Args:
        model: model with its weights loaded, or a streamed model.
        sampling: how each token is chosen.
        stop_at: token ids that each end a text and are not part of it, such as end-of-text.
    """

    def __init__(
        self, model: GPTJ | StreamedModel, sampling: Sampling, *, stop_at: Collection[int] = ()
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._stop_at = frozenset(stop_at)
        self._step = None if isinstance(model, StreamedModel) else _compiled(model)

    def __call__(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, first: int = 0
    ) -> list[list[int]]:
        """Return the continuation of each prompt; see `stream`."""
        found: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, first=first):
            for made, token in zip(found, tokens, strict=True):
                if token is not None:
                    made.append(token)
        return found

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, first: int = 0
    ) -> Iterator[list[int | None]]:
        """Yield the next token of every prompt, step by step; None for a prompt whose text has
        ended.

        The prompts are computed together and do not see one another: the shorter ones are
        left-padded.

        Args:
            prompts: token ids, at least one per prompt.
            max_new_tokens: largest number of tokens to add.
            first: index of the first prompt among all, for its seed.

        Raises:
            UsageError: an id is outside the vocabulary, or prompt and continuation together are too
                long.
        """
        T = max(map(len, prompts))
        for prompt in prompts:
            self._check(prompt, max_new_tokens)
        # In steps, so that texts of other lengths use the same compiled program.
        B, S = len(prompts), -(-(T + max_new_tokens) // CACHE_STEP) * CACHE_STEP
        padding_B1 = np.array([[T - len(prompt)] for prompt in prompts])
        visible_BS = np.arange(S)[None] >= padding_B1
        ids_BT = np.zeros((B, T), np.int32)
        for row, prompt in zip(ids_BT, prompts, strict=True):
            row[T - len(prompt) :] = prompt
        read = self._decoder(B, S)
        seeds = (self._sampling.seed + first + n for n in range(B))
        randoms = [np.random.default_rng(seed) for seed in seeds]
        seen = [set(prompt) for prompt in prompts]
        ended = [False] * B
        start = 0
        for _ in range(max_new_tokens):
            columns = np.arange(start, start + ids_BT.shape[1])
            positions_BT = np.maximum(columns[None] - padding_B1, 0).astype(np.int32)
            logits_BV = read(ids_BT, positions_BT, visible_BS)
            start += ids_BT.shape[1]
            ids_BT = np.zeros((B, 1), np.int32)
            for n, logits_V in enumerate(logits_BV):
                if ended[n]:
                    continue
                ids_BT[n] = choose(logits_V, self._sampling, randoms[n], seen[n])
                seen[n].add(int(ids_BT[n, 0]))
                ended[n] = int(ids_BT[n, 0]) in self._stop_at
            if all(ended):
                return
            yield [None if end else int(i) for end, i in zip(ended, ids_BT[:, 0], strict=True)]

    def _decoder(self, batch: int, length: int) -> Decoder:
        if isinstance(self._model, StreamedModel):
            return StreamedDecoder(self._model, batch, length)
        return ResidentDecoder(self._step, self._model.empty_caches(batch, length))

    def _check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        config = self._model.config
        if not prompt:
            raise UsageError("the prompt is empty, expected at least one token")
        outside = [i for i in prompt if not 0 <= i < config.vocab_size]
        if outside:
            raise UsageError(
                f"the prompt holds the id {outside[0]}, expected 0 to {config.vocab_size - 1}"
            )
        if (length := len(prompt) + max_new_tokens) > config.n_positions:
            raise UsageError(
                f"prompt and continuation are {length} tokens, "
                f"expected at most the model's {config.n_positions}"
            )


def choose(
    logits_V: np.ndarray,
    sampling: Sampling,
    random: np.random.Generator,
    seen: Collection[int] = (),
) -> int:
    """Return one token id chosen from float logits of shape (V,), after the tokens `seen`."""
    if sampling.repetition_penalty != 1 and seen:
        logits_V, there = logits_V.copy(), np.fromiter(seen, np.int64)
        values = logits_V[there]
        penalty = np.float32(sampling.repetition_penalty)
        logits_V[there] = np.where(values > 0, values / penalty, values * penalty)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    scaled = logits_V.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = np.exp(scaled[order] - scaled[order[0]])
    p /= p.sum()
    # The token that crosses the threshold stays, so at least one does.
    kept = np.cumsum(p) - p < sampling.top_p
    p = p[kept] / p[kept].sum()
    return int(random.choice(order[kept], p=p))


def _compiled(model: GPTJ) -> Callable[..., tuple[Tensor, list[Cache]]]:
    """Return one decoding step, compiled on TensorFlow: logits (B, V) of the last token, and
    caches."""

    def step(
        ids_BT: Tensor,
        positions_BT: Tensor,
        visible_BS: Tensor,
        caches: list[Cache],
        start: Tensor,
    ) -> tuple[Tensor, list[Cache]]:
        logits_BTV, caches = model.call_cached(
            ids_BT, caches, start, positions_BT, visible_BS, last=True
        )
        return logits_BTV[:, 0], caches

    if keras.backend.backend() != "tensorflow":
        return step
    import tensorflow as tf

    plain = tf.function(step, reduce_retracing=True)
    # For a single token, launching the operations one by one takes a third of the time.
    of_one = tf.function(step, jit_compile=True)

    def compiled(ids_BT: Tensor, *rest: Tensor) -> tuple[Tensor, Any]:
        return (of_one if ids_BT.shape == (1, 1) else plain)(ids_BT, *rest)

    return compiled
