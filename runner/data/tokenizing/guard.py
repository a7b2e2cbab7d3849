"""What a faster library must show before it stands in for `tokenizers`.

The libraries split a text into words by the classes of its characters: letters, numbers, white
space and others. Each library has its own edition of Unicode, and a character that they class
differently can change the ids around it. Texts with such a character are left to `tokenizers`.

The classes are found with a vocabulary made for the purpose, in which a character joins the mark
beside it only where both are in one word. So they do not depend on the vocabulary in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

Encode = Callable[[str], np.ndarray]
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Known:
    """What was measured of two libraries, so that it need not be measured in every run."""

    differing: Ranges
    """Code points that they class differently, as first and last of each range."""
    digest: str
    """What `digest` gives for the others, with both."""


#: Facts of two libraries by their versions; tests/unit/test_tokenizing.py measures them again. The
#: ranges are those that Unicode 17 assigns.
KNOWN: dict[tuple[str, str], Known] = {
    ("gigatoken 0.10.0", "tokenizers 0.23.3"): Known(
        differing=(
            (0x88F, 0x88F),
            (0xC5C, 0xC5C),
            (0xCDC, 0xCDC),
            (0xA7CE, 0xA7CF),
            (0xA7D2, 0xA7D2),
            (0xA7D4, 0xA7D4),
            (0xA7F1, 0xA7F1),
            (0x10940, 0x10959),
            (0x10EC5, 0x10EC7),
            (0x11DB0, 0x11DDB),
            (0x11DE0, 0x11DE9),
            (0x16EA0, 0x16EB8),
            (0x16EBB, 0x16ED3),
            (0x16FF2, 0x16FF6),
            (0x187F8, 0x187FF),
            (0x18D09, 0x18D1E),
            (0x18D80, 0x18DF2),
            (0x1E6C0, 0x1E6DE),
            (0x1E6E0, 0x1E6E2),
            (0x1E6E4, 0x1E6E5),
            (0x1E6E7, 0x1E6ED),
            (0x1E6F0, 0x1E6F4),
            (0x1E6FE, 0x1E6FF),
            (0x2B73A, 0x2B73F),
            (0x2CEA2, 0x2CEAD),
            (0x323B0, 0x33479),
        ),
        digest="279fb566efdfcfcf2b1bb536db9d24c45105e2309aea00c4cdadb468fa6cf36b",
    ),
}

#: Code points that `digest` covers: the planes with assigned characters.
_ASSIGNED = (range(0x40000), range(0xE0000, 0xE1000))
_SURROGATES = range(0xD800, 0xE000)
_LAST = 0x10FFFF
#: Number of code points compared in one text.
_TOGETHER = 256
#: Distance of the tokens of a vocabulary that are compared.
_EVERY = 8


def differing(open_other: Callable[[str], Encode]) -> Ranges:
    """Return the ranges of code points that another library classes differently.

    Args:
        open_other: function that opens a tokenizer.json, given as text, with the other library.
    """
    ours = marking_tokenizer()
    theirs = open_other(ours.to_str())
    points = [point for point in range(_LAST + 1) if point not in _SURROGATES]
    found: list[int] = []
    for start in range(0, len(points), _TOGETHER * 32):
        groups = [
            points[at : at + _TOGETHER]
            for at in range(start, min(start + _TOGETHER * 32, len(points)), _TOGETHER)
        ]
        for group in _unequal(ours, theirs, groups):
            found += [point for (point,) in _unequal(ours, theirs, [[p] for p in group])]
    return _ranges(found)


def digest(encode: Encode, differing: Ranges) -> str:
    """Return the SHA-256 of the ids of nearly all characters but those that differ.

    Args:
        encode: function from a text to its ids by `marking_tokenizer`.
        differing: code points to leave out.
    """
    excepted = {p for first, last in differing for p in range(first, last + 1)} | {*_SURROGATES}
    points = [p for part in _ASSIGNED for p in part if p not in excepted]
    found = sha256()
    for start in range(0, len(points), _TOGETHER):
        text = _marked(points[start : start + _TOGETHER])
        found.update(np.asarray(encode(text), "<u4").tobytes())
    return found.hexdigest()


def _marked(points: Iterable[int]) -> str:
    """Return a text whose ids show the classes of characters.

    A letter joins the `a` before it, a number the `1` between, another character the `!` after it;
    white space joins none.
    """
    return "".join(f"a{chr(p)}1{chr(p)}!" for p in points)


def _unequal(ours: Tokenizer, theirs: Encode, groups: list[list[int]]) -> list[list[int]]:
    return [groups[n] for n in unequal(ours, theirs, list(map(_marked, groups)))]


def unequal(ours: Tokenizer, theirs: Encode, texts: Sequence[str]) -> list[int]:
    """Return which of the texts get other ids from another library."""
    encodings = ours.encode_batch_fast(texts, add_special_tokens=False)
    return [
        n
        for n, (encoding, text) in enumerate(zip(encodings, texts, strict=True))
        if not np.array_equal(encoding.ids, theirs(text))
    ]


def vocabulary_sample(tokenizer: Tokenizer) -> list[str]:
    """Return texts of many of a vocabulary's tokens, to compare how two libraries merge."""
    to_bytes = {sign: byte for byte, sign in signs().items()}
    names = sorted(tokenizer.get_vocab(with_added_tokens=False))[::_EVERY]
    tokens = [bytes(to_bytes[c] for c in name) for name in names if set(name) <= to_bytes.keys()]
    return [
        between.join(tokens[at : at + 512]).decode("utf-8", "replace")
        for between in (b"", b" ")
        for at in range(0, len(tokens), 512)
    ]


def marking_tokenizer() -> Tokenizer:
    """Return a tokenizer whose ids show with which of `a`, `1` and `!` a character is a word."""
    alphabet = signs()
    vocabulary = {sign: byte for byte, sign in alphabet.items()}
    merges: list[tuple[str, str]] = []
    for mark in "a1!":
        for byte, sign in alphabet.items():
            if byte >= 0x80 or not chr(byte).isalnum():
                pairs = [(mark, sign), (sign, mark)] if sign != mark else [(mark, sign)]
                for left, right in pairs:
                    if left + right not in vocabulary:
                        merges.append((left, right))
                        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def covers_bytes(vocabulary: Iterable[str]) -> bool:
    """Return whether a byte-level vocabulary has a token for every byte."""
    return set(signs().values()) <= set(vocabulary)


class Characters:
    """Characters of some ranges, found in texts."""

    def __init__(self, ranges: Ranges) -> None:
        self._are = np.zeros(_LAST + 1, bool)
        for first, last in ranges:
            self._are[first : last + 1] = True

    def occur_in(self, text: str) -> bool:
        """Return whether a text has one of the characters."""
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        return bool(self._are.take(points).any())


def signs() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in shown)
    found = {byte: chr(byte) for byte in shown}
    return found | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _ranges(points: Iterable[int]) -> Ranges:
    found: list[tuple[int, int]] = []
    for point in points:
        if found and found[-1][1] == point - 1:
            found[-1] = (found[-1][0], point)
        else:
            found.append((point, point))
    return tuple(found)
