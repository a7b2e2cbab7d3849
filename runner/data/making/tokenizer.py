"""The tokenizer of a checkpoint, set up for raw text."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer

from gptj_convert.formats.layouts.tokenizer import END_OF_TEXT, LoadedTokenizer, read_tokenizer
from gptj_model.errors import FileFault
from runner.data.making import pieces


def load_tokenizer(folder: Path, *, allow_special: bool | None = False) -> Tokenizer:
    """Load the tokenizer of a checkpoint's folder, without truncation or padding.

    Args:
        folder: folder that holds tokenizer.json, or a vocabulary and merges; or the path of
            tokenizer.json itself.
        allow_special: read the name of a special token in a text as that token instead of as
            text; None follows the tokenizer's own files.

    Raises:
        FileFault: see `read_tokenizer`.
    """
    return _set(read_tokenizer(folder), allow_special)


def loaded(folder: Path, allow_special: bool = False) -> Tokenizer:
    """Return the shared tokenizer of a folder, which must not be changed; see `load_tokenizer`."""
    return _set(_read(folder, allow_special), allow_special)


def _read(folder: Path, allow_special: bool = False) -> LoadedTokenizer:
    return _read_once(folder, allow_special, _state(folder))


@lru_cache(maxsize=4)
def _read_once(folder: Path, allow_special: bool, state: object) -> LoadedTokenizer:
    return read_tokenizer(folder)


def settings(folder: Path) -> str:
    """Return the tokenizer of a folder as the text of a tokenizer.json, always the same string as
    long as the files are the same.

    Raises:
        FileFault: see `read_tokenizer`.
    """
    return _settings_once(folder, _state(folder))


@lru_cache(maxsize=4)
def _settings_once(folder: Path, state: object) -> str:
    return _read_once(folder, False, state).backend.to_str()


def _state(folder: Path) -> object:
    """Return a cache key that changes whenever the files do."""
    files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    return tuple((p.name, s.st_ino, s.st_size, s.st_mtime_ns) for p in files if (s := _stat(p)))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _set(found: LoadedTokenizer, allow_special: bool | None) -> Tokenizer:
    splits = found.splits_special if allow_special is None else not allow_special
    found.backend.encode_special_tokens = splits
    return found.backend


class SpecialNames:
    """The names of a tokenizer's special tokens, where they are read as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.all = {
            token.content: number
            for number, token in tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content
        }
        self._begin = os.path.commonprefix(list(self.all))  # noqa: RUF071
        # Of two names that begin alike, the longer one is found, as tokenizers do.
        longest = sorted(self.all, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)))
        self._are_text = tokenizer.encode_special_tokens

    def find(self, text: str) -> list[tuple[int, int]]:
        """Return where each name in a text begins and ends."""
        if not self.all or self._begin not in text:
            return []
        return [found.span() for found in self._pattern.finditer(text)]

    def count(self, text: str) -> int:
        """Return how many names in a text the tokenizer reads as text."""
        return len(self.find(text)) if self._are_text else 0


def notes(folder: Path) -> tuple[str, ...]:
    """Return notes for people on the tokenizer of a folder.

    Raises:
        FileFault: see `read_tokenizer`.
    """
    return _read(folder).notes


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the names of special tokens by their keys, such as `eos_token`.

    Raises:
        FileFault: see `read_tokenizer`.
    """
    return dict(_read(folder).named)


def facts(folder: Path) -> dict[str, Any]:
    """Return the properties of a tokenizer that records depend on, as JSON values.

    Raises:
        FileFault: see `read_tokenizer`.
    """
    tokenizer = loaded(folder)
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_id": end_of_text(folder),
        "tokenizer_sha256": sha256(settings(folder).encode()).hexdigest(),
    }


def end_of_text(folder: Path) -> int:
    """Return the id of the token that ends a document: the tokenizer's eos_token.

    Raises:
        FileFault: the tokenizer has neither an eos_token nor a token <|endoftext|>.
    """
    end = _read(folder).end
    if end is None:
        raise FileFault(
            f"{folder}: the tokenizer has neither an eos_token nor {END_OF_TEXT}, "
            "expected one of them to end a document",
            hint="use GPT-J's own tokenizer, or one derived from it",
        )
    return end


@lru_cache(maxsize=4)
def may_cut(settings: str) -> bool:
    """Return whether a tokenizer, given as the text of a tokenizer.json, may get a long text in
    pieces; see `pieces`."""
    stated = orjson.loads(settings)
    splitter = stated["pre_tokenizer"] or {}
    added = stated["added_tokens"]
    return (
        stated["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter["add_prefix_space"]
        and not any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added)
        and pieces.may_cut(t["content"] for t in added)
    )
