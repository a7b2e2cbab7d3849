"""What options make of the scores of the next token, as transformers' logits processors do.

Scores are float32: logits, or log-probabilities in a beam search. Of equal scores as many are kept
as in transformers, where the sort of PyTorch decides which ones; here the first ones are.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from gptj_model.decoding.options import GenerationOptions
from gptj_model.errors import GptjError


class Processors:
    """Everything that options make of scores, in transformers' order.

    Args:
        options: options of generation.
        ends: token ids that each end a text.
        least: number of new tokens before which no end is chosen.
    """

    def __init__(
        self, options: GenerationOptions, ends: Collection[int] = (), least: int = 0
    ) -> None:
        self._options = options
        self._ends = np.array(sorted(ends), np.int64)
        self._least = least
        # So that sampled beams can go on whatever ends are likely.
        self._keep = 1 if options.num_beams == 1 else max(2, len(self._ends) + 1)

    def __call__(self, scores_V: np.ndarray, ids: Sequence[int], new: int) -> np.ndarray:
        """Return the scores of the next token, -inf where it is ruled out.

        Args:
            scores_V: scores of the next token; they stay as they are.
            ids: tokens of prompt and continuation.
            new: number of tokens of the continuation.
        """
        options = self._options
        scores_V = scores_V.astype(np.float32)
        if options.repetition_penalty != 1:
            scores_V = penalize(scores_V, ids, options.repetition_penalty)
        if options.no_repeat_ngram_size:
            scores_V = ban_ngrams(scores_V, ids, options.no_repeat_ngram_size)
        if new < self._least:
            there = (self._ends >= 0) & (self._ends < len(scores_V))
            scores_V[self._ends[there]] = -np.inf
        if options.temperature:
            with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                scores_V = scores_V / options.temperature
            if options.top_k:
                scores_V = keep_top_k(scores_V, max(options.top_k, self._keep))
            if options.top_p < 1:
                scores_V = keep_top_p(scores_V, options.top_p, self._keep)
        return scores_V


def penalize(scores_V: np.ndarray, ids: Sequence[int], penalty: float) -> np.ndarray:
    """Return the scores with tokens that occur in `ids` made less likely, if the penalty is above
    1."""
    scores_V, seen = scores_V.copy(), np.array(sorted(set(ids)), np.int64)
    values = scores_V[seen]
    scores_V[seen] = np.where(values < 0, values * penalty, values / penalty)
    return scores_V


def ban_ngrams(scores_V: np.ndarray, ids: Sequence[int], size: int) -> np.ndarray:
    """Return the scores without tokens that would complete `size` successive tokens that `ids`
    hold already."""
    begun = list(ids[len(ids) + 1 - size :]) if len(ids) >= size else None
    starts = range(len(ids) - size + 1)
    banned = [ids[n + size - 1] for n in starts if list(ids[n : n + size - 1]) == begun]
    scores_V = scores_V.copy()
    scores_V[banned] = -np.inf
    return scores_V


def keep_top_k(scores_V: np.ndarray, k: int) -> np.ndarray:
    """Return the scores of the k best tokens and of those as good as the last of them."""
    k = min(k, len(scores_V))
    return np.where(scores_V < np.partition(scores_V, -k)[-k], np.float32(-np.inf), scores_V)


def keep_top_p(scores_V: np.ndarray, p: float, keep: int = 1) -> np.ndarray:
    """Return the scores of the fewest best tokens whose probabilities reach p, and of at least
    `keep` tokens."""
    order = np.argsort(-scores_V, kind="stable")[::-1]
    mass = np.cumsum(softmax(scores_V[order]), dtype=np.float64).astype(np.float32)
    removed = mass <= 1 - p
    removed[-keep:] = False
    scores_V = scores_V.copy()
    scores_V[order[removed]] = -np.inf
    return scores_V


def softmax(scores_V: np.ndarray) -> np.ndarray:
    """Return the probabilities of scores, in their dtype."""
    exp_V = np.exp(scores_V - scores_V.max())
    return exp_V / exp_V.sum()


def log_softmax(scores_V: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of scores along the last axis, in their dtype."""
    shifted_V = scores_V - scores_V.max(axis=-1, keepdims=True)
    return shifted_V - np.log(np.exp(shifted_V).sum(axis=-1, keepdims=True))


def choose(scores_V: np.ndarray, random: np.random.Generator | None) -> int:
    """Return the token of the best score, or one drawn by the probabilities of the scores.

    Raises:
        GptjError: no token can be drawn, because every one is ruled out or a score is not a number.
    """
    if random is None:
        return int(scores_V.argmax())
    if not np.isfinite(scores_V.max()):
        raise GptjError(
            "no token can be drawn: the options rule out every token, or scores are not finite",
            hint="ask for less: a higher temperature, longer n-grams; `gptj verify` finds damaged "
            "weights",
        )
    # The best first, so that scores that differ by rounding draw the same token.
    order = np.argsort(-scores_V, kind="stable")[: np.count_nonzero(scores_V > -np.inf)]
    p = softmax(scores_V[order].astype(np.float64))
    return int(random.choice(order, p=p))
