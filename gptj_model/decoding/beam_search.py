"""Beam search for the most probable continuation.

Shape suffixes: K beams, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from gptj_model.errors import UsageError
from gptj_model.network.array_type import Tensor
from gptj_model.network.layers import Cache
from gptj_model.network.model import GPTJ


@dataclass(frozen=True, kw_only=True, slots=True)
class Beam:
    """Settings of the search."""

    width: int = 4
    """Number of beams; 1 is greedy decoding."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """Number of tokens before which the end is not chosen."""
    length_penalty: float = 1.0
    """Power of the length that a beam's log-probability is divided by when beams are compared."""
    end: int
    """Token that ends a text, and is not part of it."""


class BeamSearch:
    """Beam search with one model, compiled once.

    The search ends when as many texts have ended as there are beams, or at `max_new_tokens`.

    Args:
        model: model with its weights loaded.
        beam: settings of the search.
    """

    def __init__(self, model: GPTJ, beam: Beam) -> None:
        self._model = model
        self._beam = beam
        self._step = self._step_eagerly
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self._step = tf.function(self._step_eagerly, reduce_retracing=True)

    def __call__(self, prompt: Sequence[int]) -> list[int]:
        """Return the ids of the best continuation.

        Raises:
            UsageError: prompt and continuation together are too long.
        """
        beam, width = self._beam, self._beam.width
        length = len(prompt) + beam.max_new_tokens
        if not prompt or length > self._model.config.n_positions:
            raise UsageError(
                f"prompt and continuation are {length} tokens, expected at most the model's "
                f"{self._model.config.n_positions}, and a prompt"
            )
        caches = self._model.empty_caches(1, length)
        logits_KV, caches = self._call([list(prompt)], caches, 0, [0])
        # The search starts with one beam; the first step branches it into all.
        scores_K = np.zeros(1)
        texts: list[list[int]] = [[]]
        ended: list[tuple[float, list[int]]] = []
        for made in range(beam.max_new_tokens):
            chances_KV = scores_K[:, None] + _log_softmax(logits_KV)
            if made < beam.min_new_tokens:
                chances_KV[:, beam.end] = -np.inf
            best = np.argsort(-chances_KV, axis=None, kind="stable")[: 2 * width]
            going: list[tuple[float, int, int]] = []
            for rank, at in enumerate(best):
                parent, token = divmod(int(at), chances_KV.shape[1])
                score = float(chances_KV[parent, token])
                if token != beam.end:
                    going.append((score, parent, token))
                elif rank < width:
                    ended.append((self._comparable(score, made + 1), texts[parent]))
            going = going[:width]
            texts = [[*texts[parent], token] for _, parent, token in going]
            scores_K = np.array([score for score, _, _ in going])
            if len(ended) >= width or made + 1 == beam.max_new_tokens:
                break
            parents_K = [parent for _, parent, _ in going]
            ids_KT = [[token] for _, _, token in going]
            logits_KV, caches = self._call(ids_KT, caches, len(prompt) + made, parents_K)
        if len(ended) < width:
            whole = zip(scores_K, texts, strict=True)
            ended += [(self._comparable(score, len(text)), text) for score, text in whole]
        return max(ended, key=lambda pair: pair[0])[1]

    def _comparable(self, score: float, length: int) -> float:
        return score / length**self._beam.length_penalty

    def _call(
        self,
        ids_KT: list[list[int]],
        caches: list[Cache],
        start: int,
        parents_K: list[int],
    ) -> tuple[np.ndarray, list[Cache]]:
        logits_KV, caches = self._step(
            ops.convert_to_tensor(ids_KT, dtype="int32"),
            caches,
            ops.convert_to_tensor(start, dtype="int32"),
            ops.convert_to_tensor(parents_K, dtype="int32"),
        )
        return np.asarray(logits_KV, np.float64), caches

    def _step_eagerly(
        self, ids_KT: Tensor, caches: list[Cache], start: Tensor, parents_K: Tensor
    ) -> tuple[Tensor, list[Cache]]:
        """Return the logits of the last token, after the caches are reordered by the beams'
        parents."""
        caches = [
            (ops.take(keys, parents_K, axis=0), ops.take(values, parents_K, axis=0))
            for keys, values in caches
        ]
        logits_KTV, caches = self._model.call_cached(ids_KT, caches, start)
        return logits_KTV[:, -1], caches


def _log_softmax(logits_KV: np.ndarray) -> np.ndarray:
    shifted = logits_KV - logits_KV.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
