"""Tokens of a rendered sample, in which names of special tokens may be text.

The text of a sample is tokenized once and as a whole, without the tokens that a tokenizer adds
around every text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import processors

from runner.data.making.instruction.templates import SPLIT, has_marks
from runner.data.making.long_line import Damaged
from runner.data.making.tokenizer import (
    SpecialNames,
    end_of_text,
    load_tokenizer,
    special_tokens,
)


class SampleTokens:
    """Tokenizer of samples.

    Args:
        folder: folder of the tokenizer.
        allow_special: read the name of a special token in a value as that token instead of as
            text. A name that a template writes is always that token.

    Attributes:
        end: id of end-of-text.
        special: names of special tokens by their keys, such as `eos_token`, for templates.

    Raises:
        FileFault: the tokenizer does not exist or cannot be read.
    """

    def __init__(self, folder: Path, *, allow_special: bool) -> None:
        self._tokenizer = load_tokenizer(folder)
        self._names = SpecialNames(self._tokenizer)
        # It adds no token here; it only must not take the space before a word from its place.
        self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        self._allow_special = allow_special
        self.end = end_of_text(folder)
        self.special = special_tokens(folder)
        self.special.setdefault("eos_token", str(self._tokenizer.id_to_token(self.end)))

    def protected(self, value: Any, tell: Callable[[int], None] = lambda n: None) -> Any:
        """Return the values of a sample with the names of special tokens split, if they are text.

        Args:
            value: values of a sample, or a part of them.
            tell: called with the number of names in each string.

        Raises:
            Damaged: a string holds a code point that marks parts of a text here.
        """
        if isinstance(value, dict):
            return {key: self.protected(inner, tell) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.protected(inner, tell) for inner in value]
        if not isinstance(value, str):
            return value
        if has_marks(value):
            raise Damaged("holds a code point from U+FDD0 to U+FDD2, which mark completions here")
        if self._allow_special:
            return value
        names = self._names.find(value)
        tell(len(names))
        for begin, end in reversed(names):
            if end - begin > 1:
                value = f"{value[: begin + 1]}{SPLIT}{value[begin + 1 :]}"
        return value

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """Return ids and offsets (begin and end of each token, int64) of each text."""
        self._tokenizer.encode_special_tokens = False
        plain = [n for n, text in enumerate(texts) if SPLIT not in text]
        encodings = self._tokenizer.encode_batch(
            [texts[n] for n in plain], add_special_tokens=False
        )
        found: dict[int, tuple[list[int], np.ndarray]] = {
            n: (encoding.ids, _offsets(encoding))
            for n, encoding in zip(plain, encodings, strict=True)
        }
        return [found[n] if n in found else self._divided(text) for n, text in enumerate(texts)]

    def _divided(self, text: str) -> tuple[list[int], np.ndarray]:
        """Encode a text in which some names of special tokens are text and others are tokens.

        Special tokens are where a tokenizer divides a text first, so what is between them can be
        encoded by itself.
        """
        special = set(self._names.all.values())
        whole = self._tokenizer.encode(text, add_special_tokens=False)
        tokens = [
            (number, *span)
            for number, span in zip(whole.ids, whole.offsets, strict=True)
            if number in special
        ]
        ids: list[int] = []
        offsets: list[np.ndarray] = []
        at = 0
        self._tokenizer.encode_special_tokens = True
        for number, begin, end in [*tokens, (None, len(text), len(text))]:
            shift = at - text.count(SPLIT, 0, at)
            part = self._tokenizer.encode(
                text[at:begin].replace(SPLIT, ""), add_special_tokens=False
            )
            ids += part.ids
            offsets.append(_offsets(part) + shift)
            if number is not None:
                ids.append(number)
                removed = text.count(SPLIT, 0, begin)
                offsets.append(np.array([[begin - removed, end - removed]]))
            at = end
        self._tokenizer.encode_special_tokens = False
        return ids, np.concatenate(offsets)

    def special_at(self, text: str) -> int | None:
        """Return the id of the special token that a text begins with, or None."""
        spans = self._names.find(text)
        if not spans or spans[0][0] != 0:
            return None
        return self._names.all[text[: spans[0][1]]]


def _offsets(encoding: Any) -> np.ndarray:
    return np.array(encoding.offsets, np.int64).reshape(-1, 2)
