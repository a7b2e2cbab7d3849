"""Continuing a prompt: cached decoding, greedy or sampled.

Shape suffixes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from gptj_model.errors import UsageError
from gptj_model.model import GPTJ


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


def generate(
    model: GPTJ,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop_at: int | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow a prompt, one by one.

    Args:
        model: with its weights loaded.
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
    step = _compiled(model)
    random = np.random.default_rng(sampling.seed)
    caches = model.empty_caches(1, length)
    ids_BT = np.asarray([prompt], np.int32)
    start = 0
    for _ in range(max_new_tokens):
        logits_V, caches = step(
            ops.convert_to_tensor(ids_BT), caches, ops.convert_to_tensor(start, dtype="int32")
        )
        token = choose(np.asarray(logits_V), sampling, random)
        if token == stop_at:
            return
        yield token
        start += ids_BT.shape[1]
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
        logits_BTV, caches = model.call_cached(ids_BT, caches, start)
        return logits_BTV[0, -1], caches

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(step, reduce_retracing=True)
    return step
