"""The battery of prompts, stored as ids and fitted to a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

from gptj_model.config import GPTJConfig

PROMPTS_FILE = "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One sequence at explicit positions."""

    name: str
    ids: np.ndarray
    """int32, shape (T,)."""
    positions: np.ndarray
    """int32, shape (T,): start, start + 1, …."""


def battery(config: GPTJConfig) -> list[Prompt]:
    """Every prompt, its ids taken modulo the vocabulary, lengths and positions cut to the model.

    An id below 0 counts from the vocabulary's end.
    """
    text = (files("golden") / PROMPTS_FILE).read_text(encoding="utf-8")
    return [_fit(json.loads(line), config) for line in text.splitlines()]


def _fit(line: dict, config: GPTJConfig) -> Prompt:
    ids = np.asarray(line["ids"][: config.n_positions], np.int64) % config.vocab_size
    start = min(line["start"], config.n_positions - len(ids))
    positions = np.arange(start, start + len(ids))
    return Prompt(line["name"], ids.astype(np.int32), positions.astype(np.int32))
