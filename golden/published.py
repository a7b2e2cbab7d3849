"""What the world knows of the public GPT-J-6B: published.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

PUBLISHED_FILE = "published.json"


@dataclass(frozen=True, slots=True)
class Published:
    """The facts that a checkpoint can be held against."""

    repository: str
    """On the Hugging Face hub."""
    prompt: tuple[int, ...]
    """Token ids."""
    continuation: tuple[int, ...]
    """The most likely token after the prompt, and so on."""
    source: str
    """Of the continuation."""


def published() -> Published:
    """The facts, read."""
    facts = json.loads((files("golden") / PUBLISHED_FILE).read_text(encoding="utf-8"))
    greedy = facts["greedy_continuation"]
    return Published(
        facts["repository"], tuple(greedy["prompt"]), tuple(greedy["ids"]), greedy["source"]
    )
