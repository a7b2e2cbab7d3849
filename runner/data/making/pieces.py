"""Cut long texts where the tokens of the pieces are the same as those of the whole text.

GPT-2's byte-level BPE first splits a text into words by one regular expression, and no token
crosses the border of a word. A border is certain, whatever the context, where a letter or another
visible character is followed by a space or a line break; or, in text without spaces, where a
letter is followed by an East Asian comma or full stop, or a Latin letter by a digit or vice versa.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

#: Python's \S excludes four control characters that GPT-2's \S includes, which is just as safe.
_BORDER = re.compile(
    r"(?<=\S)(?=[ \n\r\t])"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])(?=[\u3001\u3002\uff0c])"
    r"|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)
#: Number of characters at the end that are searched for a border first.
_NEAR = 4096
#: Longest word in characters; longer ones are cut, because tokenizing them would take all memory.
LONGEST_WORD = 2**20


def may_cut(words: Iterable[str]) -> bool:
    """Return whether none of these words, each of which is one token, contains a border."""
    return not any(_BORDER.search(word) for word in words)


def pieces(texts: Iterable[str], size: int) -> Iterator[str]:
    """Yield the concatenation of `texts` in pieces of about `size` characters, cut at borders."""
    rest = ""
    for text in texts:
        rest += text
        while len(rest) >= size:
            cut = _last_border(rest)
            if not cut:
                if len(rest) < max(LONGEST_WORD, size):
                    break  # wait for more text
                cut = max(LONGEST_WORD, size)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def cut(text: str, size: int) -> Iterator[str]:
    """Yield the pieces of one text, as `pieces` does."""
    if len(text) <= size:
        yield text
        return
    yield from pieces((text[at : at + size] for at in range(0, len(text), size)), size)


def _last_border(text: str) -> int:
    """Return the position of the last border, or 0 if there is none."""
    start = max(0, len(text) - _NEAR)
    while True:
        # The pattern looks at one character on each side of a border.
        found = [m.start() for m in _BORDER.finditer(text, start)]
        if found and found[-1]:
            return found[-1]
        if not start:
            return 0
        start = 0
