"""What becomes of one prompt, token by token: independent continuations, or a beam search.

Shape suffixes: K sequences of the prompt, N candidates of a beam search, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from gptj_model.decoding.options import GenerationOptions
from gptj_model.decoding.processors import Processors, choose, log_softmax

#: Function of the ids of a prompt and of the new tokens that says whether the text ends there.
Stops = Callable[[Sequence[int], Sequence[int]], bool]

#: Score of what is not to be chosen, as in transformers.
_NEVER = np.float32(-1e9)


@dataclass(slots=True)
class Continuation:
    """New tokens of one text."""

    ids: list[int] = field(default_factory=list[int])
    """Ids of the new tokens."""
    logprobs: list[float] = field(default_factory=list[float])
    """Log-probability of each new token by the model's logits, before any option alters them."""

    def plus(self, token: int, logprob: float) -> Continuation:
        """Return the text with one more token."""
        return Continuation([*self.ids, token], [*self.logprobs, logprob])


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One prompt, and what decides how it goes on and where it ends."""

    prompt: Sequence[int]
    """Ids of the prompt."""
    process: Processors
    """What options make of scores."""
    most: int
    """Largest number of new tokens."""
    ends: frozenset[int]
    """Token ids that each end the text and are not part of it."""
    stops: Stops
    """Function that says whether the last new token completes a text that ends here."""

    def scores(self, scores_V: np.ndarray, new: Sequence[int]) -> np.ndarray:
        """Return the processed scores of the token after the prompt and these new ones."""
        return self.process(scores_V, [*self.prompt, *new], len(new))

    def ended(self, new: Sequence[int]) -> bool:
        """Return whether the text ends with these new tokens."""
        return len(new) >= self.most or new[-1] in self.ends or self.stops(self.prompt, new)

    def trimmed(self, text: Continuation) -> Continuation:
        """Return the text without the token that ended it."""
        if text.ids and text.ids[-1] in self.ends:
            return Continuation(text.ids[:-1], text.logprobs[:-1])
        return text


class Search(Protocol):
    """Continuations of one prompt in the making."""

    @property
    def done(self) -> bool:
        """Whether nothing more is to be computed."""
        ...

    def step(self, logits_KV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take the logits of the next token of each sequence.

        Returns:
            ids_K: the token that each sequence goes on with.
            parents_K: the sequence that each continues.
        """
        ...

    def found(self) -> list[Continuation]:
        """Return the continuations, the best first."""
        ...


class Independent:
    """Continuations that do not know one another: greedy, or sampled.

    Args:
        task: the prompt.
        randoms: source of the draws of each continuation; None takes the most likely token.
    """

    def __init__(self, task: Task, randoms: Sequence[np.random.Generator | None]) -> None:
        self._task = task
        self._randoms = randoms
        self._texts = [Continuation() for _ in randoms]
        self._ended = [False for _ in randoms]

    @property
    def done(self) -> bool:
        """Implement `Search`."""
        return all(self._ended)

    def step(self, logits_KV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Implement `Search`."""
        ids_K = np.zeros(len(self._texts), np.int32)
        for n, (text, random) in enumerate(zip(self._texts, self._randoms, strict=True)):
            if self._ended[n]:
                continue
            token = choose(self._task.scores(logits_KV[n], text.ids), random)
            logprob = float(log_softmax(logits_KV[n].astype(np.float32))[token])
            self._texts[n] = text = text.plus(token, logprob)
            self._ended[n] = self._task.ended(text.ids)
            ids_K[n] = token
        return ids_K, np.arange(len(ids_K))

    def found(self) -> list[Continuation]:
        """Implement `Search`."""
        return [self._task.trimmed(text) for text in self._texts]


class BeamSearch:
    """Beam search as `_beam_search` of transformers does it, in its float32 arithmetic.

    Args:
        task: the prompt.
        options: options of generation.
        random: source of the draws if beams are sampled; None takes the best ones.
    """

    def __init__(
        self, task: Task, options: GenerationOptions, random: np.random.Generator | None
    ) -> None:
        K = options.num_beams
        self._task = task
        self._options = options
        self._random = random
        # The search starts with one beam; the first step branches it into all.
        self._scores_K = np.array([0, *[_NEVER] * (K - 1)], np.float32)
        self._texts = [Continuation() for _ in range(K)]
        self._finished_K = np.full(K, _NEVER)
        self._is_finished_K = np.zeros(K, bool)
        self._finished = [Continuation() for _ in range(K)]
        # Enough for every beam to go on, though each of them may end in every way.
        self._candidates = max(2, 1 + len(task.ends)) * K
        self._made = 0
        self._done = False

    @property
    def done(self) -> bool:
        """Implement `Search`."""
        return self._done

    def step(self, logits_KV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Implement `Search`."""
        K = len(self._texts)
        logprobs_KV = log_softmax(logits_KV.astype(np.float32))
        pairs = zip(logprobs_KV, self._texts, strict=True)
        processed_KV = np.stack([self._task.scores(row, text.ids) for row, text in pairs])
        total_KV = processed_KV + self._scores_K[:, None]
        best_N = self._best(total_KV.ravel())
        parents_N, ids_N = np.divmod(best_N, total_KV.shape[1])
        scores_N = total_KV.ravel()[best_N]
        texts = [
            self._texts[parent].plus(int(token), float(logprobs_KV[parent, token]))
            for parent, token in zip(parents_N, ids_N, strict=True)
        ]
        ended_N = np.array([self._task.ended(text.ids) for text in texts])
        self._made += 1
        self._finish(scores_N, texts, ended_N)
        running_N = scores_N + ended_N * _NEVER
        going_K = _top(running_N, K)
        self._scores_K = running_N[going_K]
        self._texts = [texts[n] for n in going_K]
        self._done = bool(ended_N.all()) or self._enough()
        return ids_N[going_K].astype(np.int32), parents_N[going_K]

    def found(self) -> list[Continuation]:
        """Implement `Search`."""
        return [self._task.trimmed(t) for t in self._finished[: self._options.num_return_sequences]]

    def _best(self, total: np.ndarray) -> np.ndarray:
        """Return the indices of the candidates, the best or the first drawn first."""
        if self._random is None:
            return _top(total, self._candidates)
        # The largest scores with Gumbel noise are draws without replacement.
        return _top(total + self._random.gumbel(size=len(total)), self._candidates)

    def _finish(
        self, scores_N: np.ndarray, texts: Sequence[Continuation], ended_N: np.ndarray
    ) -> None:
        """Keep the best of the texts that had ended and those that end now: only the best
        candidates, as many as there are beams, can be among them."""
        K = len(self._finished)
        counts_N = ended_N & (np.arange(len(texts)) < K)
        compared_N = scores_N / self._divisor(self._made) + ~counts_N * _NEVER
        merged = np.concatenate([self._finished_K, compared_N])
        best_K = _top(merged, K)
        every = [*self._finished, *texts]
        self._finished = [every[n] for n in best_K]
        self._finished_K = merged[best_K]
        self._is_finished_K = np.concatenate([self._is_finished_K, counts_N])[best_K]

    def _enough(self) -> bool:
        """Return whether no running beam can still matter."""
        early, penalty = self._options.early_stopping, self._options.length_penalty
        if early is True and self._is_finished_K.all():
            return True
        longest = self._task.most if early == "never" and penalty > 0 else self._made
        hoped = self._scores_K[0] / self._divisor(longest)
        worst_K = np.where(self._is_finished_K, self._finished_K.min(), _NEVER)
        return not (hoped > worst_K).any()

    def _divisor(self, length: int) -> np.float32:
        with np.errstate(over="ignore"):
            return np.float32(np.float64(length) ** self._options.length_penalty)


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the highest scores, the highest first, the first of equal ones
    first."""
    count = min(count, len(scores))
    found = np.sort(np.argpartition(-scores, count - 1)[:count])
    return found[np.argsort(-scores[found], kind="stable")]
