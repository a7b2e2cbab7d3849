"""GPT-J's tokenizer files: the GPT-2 byte-level BPE, and 143 tokens that pad the vocabulary.

The folder `gpt2` beside this module holds the vocabulary and the merges as OpenAI published them,
with their license and their SHA-256.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from gptj_convert.files.json_file import read_json
from gptj_convert.formats.layouts.hf import ADDED_TOKENS_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from gptj_convert.formats.layouts.tokenizer import END_OF_TEXT, MAX_BYTES, MAX_MARKS
from gptj_model.config import END_OF_TEXT_ID, VOCAB_SIZE

EXTRA_TOKENS = tuple(f"<|extratoken_{n}|>" for n in range(1, VOCAB_SIZE - END_OF_TEXT_ID))


def last_token_id(files: Iterable[Path]) -> tuple[int, str] | None:
    """Return the largest token id in a tokenizer's files, and the name of the file that states it.

    Args:
        files: files of a checkpoint, of which only those of a tokenizer count.

    Returns:
        The id and the file's name, or None if no file states an id.

    Raises:
        FileFault: any JSON file among them does not hold a valid JSON object.
    """
    found: list[tuple[int, str]] = []
    for path in files:
        if path.suffix == ".json":
            limits = {"max_bytes": MAX_BYTES, "max_marks": MAX_MARKS}
            values = read_json(path, expected="a JSON object", **limits)
            if path.name == TOKENIZER_FILE:
                ids = _ids(values)
            elif path.name == ADDED_TOKENS_FILE:
                ids = [i for i in values.values() if type(i) is int]
            elif path.name == TOKENIZER_CONFIG_FILE:
                ids = _decoder_ids(values)
            else:
                continue
            found += [(max(ids), path.name)] if ids else []
    return max(found, key=lambda last: last[0], default=None)


def write_tokenizer(folder: Path) -> None:
    """Write the files that transformers reads: tokenizer.json, and vocab.json with merges.txt."""
    data = files(__package__ or "") / "gpt2"
    vocab: dict[str, int] = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    merges_text = (data / "vocab.bpe").read_text(encoding="utf-8")
    lines = merges_text.split("\n")[1:]
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right]

    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=True, special=True)])
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in EXTRA_TOKENS])
    tokenizer.save(str(folder / TOKENIZER_FILE))

    settings: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": 2048,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    added = {token: END_OF_TEXT_ID + n for n, token in enumerate(EXTRA_TOKENS, start=1)}
    _write_json(folder / TOKENIZER_CONFIG_FILE, settings)
    _write_json(folder / ADDED_TOKENS_FILE, added)
    _write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text(merges_text, encoding="utf-8")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _decoder_ids(settings: dict[str, Any]) -> list[int]:
    """Return the ids of added tokens in a tokenizer_config.json."""
    decoder = settings.get("added_tokens_decoder")
    stated = decoder if isinstance(decoder, dict) else {}
    return [int(i) for i in stated if i.isdecimal() and i.isascii() and len(i) < 19]


def _ids(tokenizer: dict[str, Any]) -> list[int]:
    """Return the ids in a tokenizer.json; those in parts of unknown form are ignored."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    found: list[Any] = []
    if isinstance(vocab, dict):
        found += vocab.values()
    elif isinstance(vocab, list):  # a model with a score for each token
        found += range(len(vocab))
    if isinstance(added, list):
        found += [token.get("id") for token in added if isinstance(token, dict)]
    return [i for i in found if type(i) is int]
