"""Published facts about the public GPT-J-6B: published.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

PUBLISHED_FILE = "published.json"


@dataclass(frozen=True, slots=True)
class Published:
    """Facts that a checkpoint can be compared with."""

    repository: str
    """Repository on the Hugging Face Hub."""
    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    continuation: tuple[int, ...]
    """Most likely tokens after the prompt, one after the other."""
    source: str
    """Source of the continuation."""


def published() -> Published:
    """Return the facts."""
    facts = json.loads((files("golden") / PUBLISHED_FILE).read_text(encoding="utf-8"))
    greedy = facts["greedy_continuation"]
    return Published(
        facts["repository"], tuple(greedy["prompt"]), tuple(greedy["ids"]), greedy["source"]
    )
