"""The prompts of a verification, stored as ids and fitted to a model.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files

import numpy as np

from gptj_model.config import GPTJConfig

PROMPTS_FILE = "prompts.jsonl"

#: Prompts that also run as one batch, left-padded to the longest of them.
_PADDED = ("the dog", "17 tokens", "ids from both ends")
PADDED = "padded batch"
#: Prompt that is also decoded with a cache: some tokens at once, then one by one.
_DECODED = "17 tokens"
DECODED = "decoded with a cache"
#: Prompt of the model's full length, and the prompts it is made of.
FULL_LENGTH = "full length"
_FULL_LENGTH_OF = ("text", "source code", "other scripts and emoji")
#: Prefix of the names of prompts that start at a position, which follows.
_WINDOW = "window at "
#: Prompts that are cheap and together reach far, for what runs several times.
SHORT = ("17 tokens", "ids from both ends", "window at 2032")
#: Prompts that are continued.
_CONTINUED = ("the dog", "17 tokens")
#: Prompts that form the batch of which gradients are taken.
_TRAINED = ("17 tokens", "window at 2032")


#: Prompts that questions are made of, and the tokens of a question and of each of its answers.
_ASKED = ("text", "source code", "other scripts and emoji")
_CONTEXT, _ANSWER = 24, 8
#: Largest number of questions of each prompt, and number of answers to choose from.
_QUESTIONS, _ANSWERS = 8, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A passage of a prompt, and passages of which one follows it."""

    prompt: str
    """Name of the prompt."""
    context: tuple[int, ...]
    """Token ids of the passage."""
    answers: tuple[tuple[int, ...], ...]
    """Token ids of each passage that may follow, the true one first."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Sequences that are run together."""

    name: str
    ids: np.ndarray
    """int32, shape (B, T)."""
    positions: np.ndarray
    """int32, shape (B, T): start, start + 1, … in each row; 0 at padding."""
    real: np.ndarray
    """bool, shape (B, T): False at padding."""
    pieces: tuple[int, ...] = ()
    """Numbers of tokens to run at a time with a cache; () runs all at once."""

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.real.sum())

    @property
    def padded(self) -> bool:
        """Whether any token is padding."""
        return not self.real.all()


def battery(config: GPTJConfig, *, thorough: bool = False) -> list[Prompt]:
    """Return every prompt, with ids modulo the vocabulary, and lengths and positions cut to the
    model.

    A negative id counts from the end of the vocabulary.

    Args:
        config: configuration of the model.
        thorough: whether to add a prompt of the model's full length.
    """
    stored = _stored(config)
    decoded = stored[_DECODED]
    found = [
        *_distinct(stored.values()),
        _padded([stored[name] for name in _PADDED]),
        replace(decoded, name=DECODED, pieces=_pieces(decoded.tokens)),
    ]
    if thorough:
        ids = np.concatenate([stored[name].ids[0] for name in _FULL_LENGTH_OF])
        found.append(_prompt(FULL_LENGTH, np.resize(ids, config.n_positions), 0))
    return found


def _distinct(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Return prompts without duplicates, which a short model turns windows into."""
    kept: dict[tuple[bytes, bytes], Prompt] = {}
    for prompt in prompts:
        if prompt.name.startswith(_WINDOW):
            prompt = replace(prompt, name=f"{_WINDOW}{prompt.positions[0, 0]}")
        kept.setdefault((prompt.ids.tobytes(), prompt.positions.tobytes()), prompt)
    return list(kept.values())


def short(config: GPTJConfig) -> list[Prompt]:
    """Return the prompts of `SHORT`."""
    stored = _stored(config)
    return [stored[name] for name in SHORT]


def training_batch(config: GPTJConfig) -> Prompt:
    """Return sequences of one length whose tokens are also their labels; see `labels`."""
    stored = _stored(config)
    prompts = [stored[name] for name in _TRAINED]
    shortest = min(p.tokens for p in prompts)

    def batch(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([a[:, :shortest] for a in arrays])

    return Prompt(
        "training batch",
        batch([p.ids for p in prompts]),
        batch([p.positions for p in prompts]),
        batch([p.real for p in prompts]),
    )


def continued(config: GPTJConfig, new_tokens: int) -> list[Prompt]:
    """Return the prompts to continue by `new_tokens` tokens, cut where the model's length requires
    it."""
    stored = _stored(config)
    room = max(1, config.n_positions - new_tokens)
    found = (stored[name] for name in _CONTINUED)
    return [_prompt(p.name, p.ids[0, :room], 0) for p in found]


def questions(config: GPTJConfig) -> list[Question]:
    """Return passages of the prompts to continue, cut to the model; the wrong answers to one are
    the right ones of those after it."""
    total = min(_CONTEXT + _ANSWER, config.n_positions + 1)
    answer = min(_ANSWER, total // 2)
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for line in _lines():
        if line["name"] in _ASKED:
            ids = (np.asarray(line["ids"], np.int64) % config.vocab_size).tolist()
            for start in range(0, len(ids) - total + 1, total)[:_QUESTIONS]:
                end = start + total
                found.append(
                    (line["name"], (*ids[start : end - answer],), (*ids[end - answer : end],))
                )
    right = [own for _, _, own in found]
    return [
        Question(
            prompt=name,
            context=context,
            answers=tuple(dict.fromkeys([*right[n:], *right[:n]]))[:_ANSWERS],
        )
        for n, (name, context, _) in enumerate(found)
    ]


def labels(prompt: Prompt) -> np.ndarray:
    """Return the token after each token, int32 (B, T); the last token is followed by the first."""
    return np.roll(prompt.ids, -1, axis=1)


def _stored(config: GPTJConfig) -> dict[str, Prompt]:
    prompts = (_fit(line, config) for line in _lines())
    return {prompt.name: prompt for prompt in prompts}


def _lines() -> list[dict]:
    text = (files("golden") / PROMPTS_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _fit(line: dict, config: GPTJConfig) -> Prompt:
    ids = np.asarray(line["ids"][: config.n_positions], np.int64) % config.vocab_size
    return _prompt(line["name"], ids, min(line["start"], config.n_positions - len(ids)))


def _prompt(name: str, ids_T: np.ndarray, start: int) -> Prompt:
    positions = np.arange(start, start + len(ids_T), dtype=np.int32)[None]
    return Prompt(name, ids_T.astype(np.int32)[None], positions, np.ones((1, len(ids_T)), bool))


def _padded(prompts: list[Prompt]) -> Prompt:
    longest = max(p.tokens for p in prompts)

    def batch(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.pad(a, ((0, 0), (longest - a.shape[1], 0))) for a in arrays])

    return Prompt(
        PADDED,
        batch([p.ids for p in prompts]),
        batch([p.positions for p in prompts]),
        batch([p.real for p in prompts]),
    )


def _pieces(length: int) -> tuple[int, ...]:
    """Return most of the tokens at once, then the others one by one."""
    first = max(1, length * 2 // 3)
    return (first, *([1] * (length - first)))
