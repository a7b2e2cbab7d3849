"""Level generation: greedy and sampled continuations, token for token, with and without a cache.

Both models are given the reference's tokens, and choose each next token themselves. First they
decode with a cache; then the whole text runs once more without one.

Shape suffixes: B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from golden.compare import relative_difference
from golden.prompts import continued
from golden.published import published
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.hub.download import read_record
from gptj_convert.inspection.json_numbers import json_number
from gptj_convert.resources.footprint import logits_memory
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.verification.evidence.verdict import Difference, LevelResult, Verdict
from gptj_convert.verification.levels.logits import common_dtype
from gptj_model.decoding.options import GenerationOptions
from gptj_model.decoding.processors import Processors, choose
from gptj_model.errors import GptjError

LEVEL = "generation"

#: Number of tokens to generate, as many as were published.
_NEW_TOKENS = len(published().continuation)
_GREEDY = GenerationOptions()
_SAMPLED = GenerationOptions(temperature=1.0, top_k=50, top_p=0.95, seed=0)


#: The two ways of choosing a continuation.
_CACHED, _AT_ONCE = "with a cache", "without a cache"


@dataclass(slots=True)
class _Choices:
    """Our tokens of one continuation, chosen in one way."""

    tokens: list[int] = field(default_factory=list)
    """Each token after the reference's tokens before it; -1 where our logits are not finite."""
    relative: list[float] = field(default_factory=list)
    """|Δ| of the logits behind each token, divided by their standard deviation."""


class _Sequence:
    """One continuation on both sides."""

    def __init__(self, name: str, prompt: list[int], options: GenerationOptions) -> None:
        self.name = name
        self.prompt = prompt
        self.options = options
        self.tokens: list[int] = []
        """Tokens that the reference chose with a cache."""
        self.choices = {_CACHED: _Choices(), _AT_ONCE: _Choices()}
        self._process = Processors(options)
        self._random = {way: self._source() for way in self.choices}
        self._reference_random = self._source()

    def _source(self) -> np.random.Generator | None:
        """Return a source of draws, each of which draws the same; None for the most likely
        token."""
        return np.random.default_rng(self.options.seed) if self.options.temperature else None

    def choose(self, way: str, ours_V: np.ndarray, theirs_V: np.ndarray) -> None:
        """Add a token from the logits of both sides."""
        if not np.isfinite(theirs_V).all():
            raise GptjError(
                f"continuing {self.name!r}: the original's logits are NaN or infinite, so nothing "
                "can be judged",
                hint="compare bits with `--level weights`; its weights hold NaN or infinite values",
            )
        choices = self.choices[way]
        with np.errstate(invalid="ignore"):
            choices.relative.append(relative_difference(ours_V, theirs_V))
        finite = np.isfinite(ours_V).all()
        token = self._chosen(ours_V, self._random[way]) if finite else -1
        choices.tokens.append(token)
        if way == _CACHED:
            self.tokens.append(self._chosen(theirs_V, self._reference_random))

    def _chosen(self, logits_V: np.ndarray, random: np.random.Generator | None) -> int:
        return choose(self._process(logits_V, (), 0), random)

    def unlike(self, way: str) -> list[int]:
        """Return the indices of our tokens that differ from the reference's."""
        pairs = enumerate(zip(self.choices[way].tokens, self.tokens, strict=True))
        return [n for n, (x, y) in pairs if x != y]

    def difference(self, tolerance: float) -> Difference | None:
        """Return the first token that differs although its logits do not agree; agreeing logits are
        a tie."""
        for way, choices in self.choices.items():
            for n in self.unlike(way):
                if not choices.relative[n] <= tolerance:
                    found = f"token {n + 1} of the continuation, {way}, is {choices.tokens[n]}"
                    return Difference(LEVEL, found, str(self.tokens[n]), prompt=self.name)
        return None


_Group = Sequence[_Sequence]
"""Continuations of one prompt, which are generated as one batch."""


def compare_generation(checkpoint: Checkpoint, source: Checkpoint, verdict: Verdict) -> Work[None]:
    """Judge the level, and add it to the verdict.

    Raises:
        GptjError: the reference's logits are NaN or infinite, so nothing can be judged.
    """
    from golden.reference import StreamedReference
    from gptj_model.streaming.forward import StreamedModel

    config = source.config
    ours = StreamedModel(checkpoint.config, checkpoint.source, checkpoint.scheme)
    reference = StreamedReference(
        config, source.source, source.scheme, round_to=common_dtype(checkpoint)
    )
    groups = [
        [
            _Sequence(f"{prompt.name}, {word}", prompt.ids[0].tolist(), options)
            for word, options in (("greedy", _GREEDY), ("sampled", _SAMPLED))
        ]
        for prompt in continued(config, _NEW_TOKENS)
    ]
    sequences = [s for group in groups for s in group]
    verdict.plan_memory(logits_memory(config, [len(s.prompt) + _NEW_TOKENS for s in sequences]))
    stages = (_NEW_TOKENS + 1) * config.n_layer
    events = chain(_decode(ours, reference, groups), _at_once(ours, reference, groups))
    for done, event in enumerate(events, start=1):
        yield Progress(done, stages, event)
    found = [s.difference(verdict.tolerance) for s in sequences]
    known = _published(source, sequences)
    if known and not known["ok"]:
        found.append(_unlike_published(known))
    verdict.note(*filter(None, found))
    verdict.levels[LEVEL] = LevelResult(
        ok=not any(found),
        figures={
            "new_tokens": _NEW_TOKENS,
            "relative": json_number(
                max(max(c.relative) for s in sequences for c in s.choices.values())
            ),
            "ties": sum(len(s.unlike(way)) for s in sequences for way in s.choices),
            "sequences": [
                {
                    "name": s.name,
                    "prompt": s.prompt,
                    "expected": s.tokens,
                    "found": {way: c.tokens for way, c in s.choices.items()},
                }
                for s in sequences
            ],
            "published": known,
        },
    )


def _decode(ours: Any, reference: Any, groups: Sequence[_Group]) -> Iterator[str]:
    """Generate every continuation token by token, all groups through each block in turn."""
    layers = range(reference.config.n_layer)
    length = max(len(s.prompt) for group in groups for s in group) + _NEW_TOKENS
    our_caches = [[ours.empty_cache(len(group), length) for _ in layers] for group in groups]
    their_caches = [[reference.empty_cache() for _ in layers] for _ in groups]
    given = [np.asarray([s.prompt for s in group], np.int32) for group in groups]
    starts = [0 for _ in groups]
    for token in range(_NEW_TOKENS):
        found = [ours.embed(ids_BT) for ids_BT in given]
        expected = [reference.embed(ids_BT) for ids_BT in given]
        for i in layers:
            our_block, their_block = ours.load_block(i), reference.load_block(i)
            for n, start in enumerate(starts):
                positions = _positions(given[n], start)
                found[n], our_caches[n][i] = our_block.run_cached(
                    found[n], positions, our_caches[n][i], start
                )
                expected[n] = their_block.run_cached(expected[n], positions, their_caches[n][i])
            yield f"token {token + 1}, block {i}"
        last = [_of_last_tokens(*side, 1) for side in ((ours, found), (reference, expected))]
        _choose(_CACHED, groups, *last)
        starts = [start + ids_BT.shape[1] for start, ids_BT in zip(starts, given, strict=True)]
        given = [np.asarray([s.tokens[-1:] for s in group], np.int32) for group in groups]


def _at_once(ours: Any, reference: Any, groups: Sequence[_Group]) -> Iterator[str]:
    """Choose every token again, from one pass over all of them."""
    ids = [np.asarray([s.prompt + s.tokens[:-1] for s in group], np.int32) for group in groups]
    models = (ours, reference)
    states = [[model.embed(ids_BT) for ids_BT in ids] for model in models]
    for i in range(reference.config.n_layer):
        for n, model in enumerate(models):
            block = model.load_block(i)
            states[n] = [
                block.run(x, _positions(ids_BT, 0))
                for x, ids_BT in zip(states[n], ids, strict=True)
            ]
        yield f"without a cache, block {i}"
    written = [
        _of_last_tokens(model, own, _NEW_TOKENS) for model, own in zip(models, states, strict=True)
    ]
    _choose(_AT_ONCE, groups, *written)


def _positions(ids_BT: np.ndarray, start: int) -> np.ndarray:
    """Return positions start, start + 1, … in each row: int32 (B, T)."""
    B, T = ids_BT.shape
    return np.tile(np.arange(start, start + T, dtype=np.int32), (B, 1))


def _of_last_tokens(model: Any, states: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Return logits (B, T, V) of the last `count` tokens of each group."""
    head = model.head()
    return head.logits(head.normed([x_BTD[:, -count:] for x_BTD in states]))


def _choose(
    way: str, groups: Sequence[_Group], ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]
) -> None:
    """Choose a token of each sequence from each of its logits in turn."""
    for group, ours_BTV, theirs_BTV in zip(groups, ours, theirs, strict=True):
        for s, ours_TV, theirs_TV in zip(group, ours_BTV, theirs_BTV, strict=True):
            for ours_V, theirs_V in zip(ours_TV, theirs_TV, strict=True):
                s.choose(way, ours_V, theirs_V)


def _published(source: Checkpoint, sequences: Sequence[_Sequence]) -> dict[str, Any] | None:
    """Return the published continuation beside the generated one; None unless the source is the
    public model, whose files the download compared with the hub's SHA-256."""
    facts, record = published(), read_record(source.folder)
    downloaded = {path.name for path in source.files}
    if not record or record.repository.lower() != facts.repository.lower():
        return None
    if not downloaded <= record.files.keys():
        return None
    for s in sequences:
        if tuple(s.prompt) == facts.prompt and s.options is _GREEDY:
            return {
                "ok": tuple(s.choices[_CACHED].tokens) == facts.continuation,
                "prompt": s.name,
                "expected": list(facts.continuation),
                "found": s.choices[_CACHED].tokens,
                "source": facts.source,
            }
    return None


def _unlike_published(known: dict[str, Any]) -> Difference:
    return Difference(
        LEVEL,
        f"the continuation {known['found']}",
        f"{known['expected']}, as published: {known['source']}",
        prompt=known["prompt"],
    )
