"""Continuation of prompts: several at once, greedy, sampled or by beam search.

Shape suffixes: B batch, T time, S length of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import keras
import numpy as np

from gptj_model.decoding.decoders import (
    Decoder,
    ResidentDecoder,
    StreamedDecoder,
    compiled_step,
)
from gptj_model.decoding.options import GenerationOptions
from gptj_model.decoding.processors import Processors
from gptj_model.decoding.search import (
    BeamSearch,
    Continuation,
    Independent,
    Search,
    Stops,
    Task,
)
from gptj_model.errors import UsageError
from gptj_model.network.model import GPTJ
from gptj_model.streaming.forward import StreamedModel

#: Step in which the lengths of caches grow.
CACHE_STEP = 64


class Generator:
    """Continuation of prompts with one model, compiled once.

    Args:
        model: model with its weights loaded, or a streamed model.
        stop_at: token ids that each end a text and are not part of it, such as end-of-text.
        stops: function of the ids of a prompt and of its new tokens that says whether the last one
            completes a text that ends there, with that token.
    """

    def __init__(
        self,
        model: GPTJ | StreamedModel,
        *,
        stop_at: Collection[int] = (),
        stops: Stops = lambda prompt, new: False,
    ) -> None:
        self._model = model
        self._stop_at = frozenset(stop_at)
        self._stops = stops
        self._step = None if isinstance(model, StreamedModel) else compiled_step(model)

    def __call__(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions, *, first: int = 0
    ) -> list[list[Continuation]]:
        """Return the continuations of each prompt, the best first.

        The prompts are computed together and do not see one another: the shorter ones are
        left-padded.

        Args:
            prompts: token ids, at least one per prompt.
            options: options of generation.
            first: index of the first prompt among all, for its seed.

        Raises:
            UsageError: a prompt cannot be continued; see `GenerationOptions.problem`.
        """
        searches = self._searches(prompts, options, first)
        for _ in self._run(searches, prompts, options):
            pass
        return [search.found() for search in searches]

    def stream(self, prompt: Sequence[int], options: GenerationOptions) -> Iterator[Continuation]:
        """Yield the continuation of one prompt after each step; options must not ask for beams or
        several continuations.

        Raises:
            UsageError: the prompt cannot be continued; see `GenerationOptions.problem`.
        """
        (search,) = searches = self._searches([prompt], options, 0)
        for _ in self._run(searches, [prompt], options):
            yield search.found()[0]

    def _run(
        self,
        searches: Sequence[Search],
        prompts: Sequence[Sequence[int]],
        options: GenerationOptions,
    ) -> Iterator[None]:
        """Run the model step by step until every search is done."""
        B, T, K = len(prompts), max(map(len, prompts)), options.rows
        config = self._model.config
        longest = T + max(options.most(len(prompt), config) for prompt in prompts)
        # In steps, so that texts of other lengths use the same compiled program.
        S = -(-longest // CACHE_STEP) * CACHE_STEP
        padding_B1 = np.array([[T - len(prompt)] for prompt in prompts])
        ids_BT = np.zeros((B, T), np.int32)
        for row, prompt in zip(ids_BT, prompts, strict=True):
            row[T - len(prompt) :] = prompt
        decoder = self._decoder(B, S, options)
        logits_BV = _read(decoder, ids_BT, 0, padding_B1, S)
        # Every prompt is read once, and then branches into its sequences.
        own = np.arange(B * K)
        parents = own // K
        logits_BV, padding_B1 = logits_BV[parents], padding_B1[parents]
        for end in range(T, S + 1):
            ids = np.zeros(B * K, np.int32)
            chosen = own.copy()
            for n, search in enumerate(searches):
                at = slice(n * K, (n + 1) * K)
                if not search.done:
                    ids[at], within = search.step(logits_BV[at])
                    chosen[at] = n * K + within
                else:  # any would do; a decoder that looks ahead expects these
                    ids[at] = logits_BV[at].argmax(axis=-1)
            yield
            if all(search.done for search in searches):
                return
            parents = parents[chosen]
            if len(parents) != B or (parents != own).any():
                decoder.reorder(parents)
            parents = own
            logits_BV = _read(decoder, ids[:, None], end, padding_B1, S)

    def _searches(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions, first: int
    ) -> list[Search]:
        searches: list[Search] = []
        for n, prompt in enumerate(prompts):
            if problem := options.problem(prompt, self._model.config):
                raise UsageError(problem)
            task = Task(
                prompt=list(prompt),
                process=Processors(options, self._stop_at, options.least(len(prompt))),
                most=options.most(len(prompt), self._model.config),
                ends=self._stop_at,
                stops=self._stops,
            )
            count = 1 if options.num_beams > 1 else options.rows
            seeds = range((first + n) * count, (first + n + 1) * count)
            randoms = [
                np.random.default_rng(options.seed + i) if options.temperature else None
                for i in seeds
            ]
            if options.num_beams > 1:
                searches.append(BeamSearch(task, options, randoms[0]))
            else:
                searches.append(Independent(task, randoms))
        return searches

    def _decoder(self, batch: int, length: int, options: GenerationOptions) -> Decoder:
        if isinstance(self._model, StreamedModel):
            return StreamedDecoder(self._model, batch, length)
        caches = self._model.empty_caches(batch, length)
        # TensorFlow's programs wait for their result anyway.
        ahead = keras.backend.backend() == "jax" and options.takes_the_most_likely
        return ResidentDecoder(self._step, caches, ahead=ahead)


def _read(
    decoder: Decoder, ids_BT: np.ndarray, start: int, padding_B1: np.ndarray, length: int
) -> np.ndarray:
    """Return the logits (B, V) after further tokens, which begin at column `start`."""
    columns = np.arange(start, start + ids_BT.shape[1])
    positions_BT = np.maximum(columns[None] - padding_B1, 0).astype(np.int32)
    return decoder(ids_BT, positions_BT, np.arange(length)[None] >= padding_B1)
