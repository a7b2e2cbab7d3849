"""Split a list of JSON into its elements, in bounded memory."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from runner.data.making.long_line import Damaged

#: A whole string, or one sign of the structure; a quotation mark alone begins a string that the
#: window cuts.
_SIGN = re.compile(rb'"(?:[^"\\]|\\.)*+"|["\[\]{},]', re.DOTALL)
_SPACE = b" \t\r\n"


def begins_list(head: bytes) -> bool:
    """Return whether the beginning of a file is that of a list."""
    return head.lstrip(_SPACE).startswith(b"[")


class Elements:
    """The elements of a list, split where its commas are; they are not parsed.

    Args:
        blocks: content of the file.
        most: largest number of bytes of an element.

    Attributes:
        line: line, from 1, that has been reached.
    """

    def __init__(self, blocks: Iterable[bytes], most: int) -> None:
        self._blocks = iter(blocks)
        self._most = most
        self._window = b""
        self._start = 0  # of the element in the window
        self._too_long = False
        self.line = 1

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield the line and the bytes of each element, or None for bytes beyond the limit.

        Raises:
            Damaged: the list has no end, or something follows it.
        """
        at = depth = count = 0
        while True:
            found = _SIGN.search(self._window, at)
            if not found or found[0] == b'"':
                at = found.start() if found else len(self._window)
                at = self._read_more(at)
                continue
            at, sign = found.end(), found[0]
            if sign in (b",", b"]") and depth == 1:
                count += 1
                element = self._element(found.start(), at)
                if element[1] or count > 1 or sign == b",":
                    yield element
            depth += (sign in (b"[", b"{")) - (sign in (b"]", b"}"))
            if sign == b"[" and depth == 1:
                self._skip(at)
            elif depth <= 0:
                self._check_end(at)
                return

    def _read_more(self, at: int) -> int:
        """Append a block to the window, which begins at the element; return the new position."""
        if len(self._window) - at > self._most:
            raise Damaged(f"has a string of more than {self._most} bytes", line=self.line - 1)
        if at - self._start > self._most:
            self._too_long = True
            self._skip(at)
        block = next(self._blocks, b"")
        if not block:
            self._skip(len(self._window))
            raise Damaged("the list has no end", line=self.line - 1)
        moved, self._start = self._start, 0
        self._window = self._window[moved:] + block
        return at - moved

    def _element(self, end: int, then: int) -> tuple[int, bytes | None]:
        """Return line and bytes of the element before `end`; the next one begins at `then`."""
        whole = self._window[self._start : end]
        before = len(whole) - len(whole.lstrip(_SPACE))
        line = self.line + whole.count(b"\n", 0, before)
        too_long, self._too_long = self._too_long or len(whole) > self._most, False
        self._skip(then)
        return line, None if too_long else whole.strip(_SPACE)

    def _skip(self, at: int) -> None:
        self.line += self._window.count(b"\n", self._start, at)
        self._start = at

    def _check_end(self, at: int) -> None:
        self._skip(at)
        for rest in itertools.chain([self._window[at:]], self._blocks):
            space = len(rest) - len(rest.lstrip(_SPACE))
            self.line += rest.count(b"\n", 0, space)
            if space < len(rest):
                raise Damaged("something follows the list", line=self.line - 1)
