"""Long texts cut where the tokens are the same as those of the whole.

GPT-2's byte-level BPE first splits a text into words by one regular expression, and no token
crosses the border of a word. A border that no longer context can move lies where a letter or
any other visible sign is followed by a space or a line break; or, in text without spaces, where
a letter is followed by a full stop of East Asia, or a Latin letter by a digit or the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

#: Python's \S leaves out four control characters that GPT-2's takes in, which is as safe.
_BORDER = re.compile(
    r"(?<=\S)(?=[ \n\r\t])"
    r"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])(?=[\u3001\u3002\uff0c])"
    r"|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"
)
#: Characters from the end among which a border is looked for first.
_NEAR = 4096
#: A word of so many characters is cut all the same: tokenising it whole would take all memory.
LONGEST_WORD = 2**20


def may_cut(words: Iterable[str]) -> bool:
    """Whether none of these texts, which are tokens as wholes, holds a border."""
    return not any(_BORDER.search(word) for word in words)


def pieces(texts: Iterable[str], size: int) -> Iterator[str]:
    """The concatenation of `texts`, cut at borders into pieces of about `size` characters."""
    rest = ""
    for text in texts:
        rest += text
        while len(rest) >= size:
            cut = _last_border(rest)
            if not cut:
                if len(rest) < max(LONGEST_WORD, size):
                    break  # until there is more of it
                cut = max(LONGEST_WORD, size)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def cut(text: str, size: int) -> Iterator[str]:
    """A text that is at hand, as `pieces` cuts it."""
    if len(text) <= size:
        yield text
        return
    yield from pieces((text[at : at + size] for at in range(0, len(text), size)), size)


def _last_border(text: str) -> int:
    """Where the last border is; 0 when there is none."""
    start = max(0, len(text) - _NEAR)
    while True:
        # A border looks at one character on each side of it.
        found = [m.start() for m in _BORDER.finditer(text, start)]
        if found and found[-1]:
            return found[-1]
        if not start:
            return 0
        start = 0
