"""The tokenizer of a checkpoint, as raw text needs it."""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from gptj_convert.tokenizer import END_OF_TEXT, TOKENIZER_FILE
from gptj_model.errors import FileFault
from runner.data import pieces

#: Vocabulary and merges, as GPT-2's, EleutherAI's and others' files are named.
VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def load_tokenizer(folder: Path, *, allow_special: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, without truncation or padding.

    Args:
        folder: with tokenizer.json, or with a vocabulary and merges; or the first file itself.
        allow_special: a special token's name in the text is read as that token, not as text.

    Raises:
        FileFault: there is none.
    """
    path = folder / TOKENIZER_FILE if folder.is_dir() else folder
    pairs = [(folder / v, folder / m) for v, m in VOCABULARY_FILES]
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
        else:
            pair = next((p for p in pairs if all(f.is_file() for f in p)), None)
            if pair is None:
                raise FileFault(
                    f"{path}: not found, expected a tokenizer",
                    hint="name a folder with tokenizer.json, such as ./gpt-j-6b",
                )
            tokenizer = _from_vocabulary(*map(str, pair))
    except FileFault:
        raise
    except Exception as e:  # the library raises bare Exception for a bad file
        raise FileFault(f"{path}: is not a tokenizer: {e}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not allow_special
    return tokenizer


def loaded(folder: Path, allow_special: bool = False) -> Tokenizer:
    """See `load_tokenizer`; the same object for the same arguments, not to be changed."""
    return _loaded(folder, allow_special)


@lru_cache(maxsize=4)
def _loaded(folder: Path, allow_special: bool) -> Tokenizer:
    return load_tokenizer(folder, allow_special=allow_special)


def facts(folder: Path) -> dict[str, Any]:
    """What records depend on, for JSON.

    Raises:
        FileFault: there is no tokenizer.
    """
    tokenizer = loaded(folder)
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_id": end_of_text(tokenizer),
        "tokenizer_sha256": sha256(tokenizer.to_str().encode()).hexdigest(),
    }


def _from_vocabulary(vocabulary: str, merges: str) -> Tokenizer:
    tokenizer = Tokenizer(BPE.from_file(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=True, special=True)])
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that separates documents.

    Raises:
        FileFault: the tokenizer has none.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise FileFault(
            f"the tokenizer has no {END_OF_TEXT}, which separates documents",
            hint="name GPT-J's own tokenizer, or one made from it",
        )
    return end


def may_cut(tokenizer: Tokenizer) -> bool:
    """Whether a long text can be tokenised in pieces: see `pieces`."""
    settings = json.loads(tokenizer.to_str())
    splitter = settings["pre_tokenizer"] or {}
    added = settings["added_tokens"]
    return (
        settings["normalizer"] is None
        and splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter["add_prefix_space"]
        and not any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added)
        and pieces.may_cut(t["content"] for t in added)
    )
