"""A byte-level vocabulary of 263 tokens, in the files of GPT-2's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import pre_tokenizers

END = "<|endoftext|>"
END_ID = 262
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o")]
VOCAB = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
VOCAB |= {a + b: 256 + n for n, (a, b) in enumerate(MERGES)} | {END: END_ID}


def write_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt."""
    (folder / "vocab.json").write_text(json.dumps(VOCAB))
    merges = "".join(f"{a} {b}\n" for a, b in MERGES)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
