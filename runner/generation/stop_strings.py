"""Texts that end a continuation, found in the bytes of its tokens as transformers finds them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

#: Characters that stand for bytes in the tokens of a byte-level tokenizer: visible ones for
#: themselves, and those from U+0100 for the others.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = sorted({*range(256)} - {*_VISIBLE})
_BYTES = {chr(b): b for b in _VISIBLE} | {chr(256 + n): b for n, b in enumerate(_HIDDEN)}
#: A byte as a token of a tokenizer that falls back to bytes.
_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")
#: Text before a token that is decoded alone, which would else lose its space.
_BEFORE = "abcdef"


class StopStrings:
    """Function of token ids that says whether the last one completes a stop string, which may begin
    in the prompt.

    Args:
        tokenizer: tokenizer of the ids.
        texts: the stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._wanted = [text.encode() for text in texts]
        self._longest = max(map(len, self._wanted), default=0)
        self._kinds = set(_kinds(json.loads(tokenizer.to_str())["decoder"]))
        self._before = tokenizer.encode(_BEFORE, add_special_tokens=False).tokens
        self._known: dict[int, bytes | None] = {}

    def __call__(self, prompt: Sequence[int], new: Sequence[int]) -> bool:
        """Return whether a stop string ends within the last new token."""
        if not self._wanted:
            return False
        ids = [*prompt, *new]
        last = self._bytes(ids[-1])
        if not last:
            return False
        tail = last
        for i in reversed(ids[-self._longest : -1]):
            before = self._bytes(i)
            if before is None or len(tail) >= len(last) + self._longest - 1:
                break
            tail = before + tail
        start = len(tail) - len(last) + 1
        return any(tail.find(text, max(0, start - len(text))) >= 0 for text in self._wanted)

    def _bytes(self, i: int) -> bytes | None:
        """Return what a token adds to a text, or None for an id that is no token."""
        if i not in self._known:
            token = self._tokenizer.id_to_token(i)
            self._known[i] = None if token is None else self._decoded(token)
        return self._known[i]

    def _decoded(self, token: str) -> bytes:
        if "ByteFallback" in self._kinds:
            if found := _FALLBACK.fullmatch(token):
                return bytes.fromhex(found[1])
        elif "ByteLevel" in self._kinds and all(c in _BYTES for c in token):
            return bytes(_BYTES[c] for c in token)
        decoder = self._tokenizer.decoder
        pieces = [*self._before, token]
        text = decoder.decode(pieces) if decoder else " ".join(pieces)
        return text.partition(_BEFORE)[2].encode()


def _kinds(decoder: Any) -> Iterator[str]:
    """Yield the types of a decoder and of its parts."""
    if isinstance(decoder, Mapping):
        yield str(decoder.get("type"))
        for part in decoder.get("decoders", ()):
            yield from _kinds(part)
