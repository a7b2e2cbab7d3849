"""Read a string, piece by piece, from a line of JSON that is too long for memory.

The line is copied to a temporary file. The line without its long strings is parsed as usual; the
long strings stay in the file and are decoded on demand.
"""

from __future__ import annotations

import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

#: Size in bytes from which a string stays in the file.
_LONG_STRING = 2**16
#: Largest size in bytes of the line without its long strings.
_MAX_REST = 8 * 2**20
#: Largest number of bytes that encode one character: two escaped surrogates.
_LONGEST_CHARACTER = 12

#: Largest number of keys that an error names, and characters of one.
_NAMES, _LONGEST_NAME = 12, 40

#: The inside of a string, up to its end or the end of the buffer.
_INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class Damaged(Exception):
    """A document is malformed; the text says why.

    Attributes:
        line: line of the damage, counted from 0 at the first line of the document.
        hint: command or option that helps, if one is known.
        reason: name of the rule that a sound document breaks; None for a malformed document.
    """

    def __init__(
        self, text: str, *, line: int = 0, hint: str | None = None, reason: str | None = None
    ) -> None:
        super().__init__(text)
        self.line = line
        self.hint = hint
        self.reason = reason


class LongLine:
    """A line of JSON in a temporary file.

    Args:
        file: file to read the rest of the line from.
        begun: beginning of the line, which has been read already.
        folder: folder of the temporary file, which has no name there.
        step: number of bytes that are processed at a time.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, file: BinaryIO, begun: bytes, folder: Path, step: int) -> None:
        self._step = step
        self._spool = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._spool.write(begun)
        while not begun.endswith(b"\n") and (begun := file.readline(step)):
            self._spool.write(begun)

    def close(self) -> None:
        """Remove the temporary file."""
        self._spool.close()

    def strings(self, key: str) -> Callable[[], Iterator[str]]:
        """Return a function whose every call yields the string under `key` in pieces.

        Raises:
            Damaged: the line is not an object, or has no string under `key`. The returned
                function raises it as well, at invalid UTF-8 or an invalid escape.
        """
        rest, holes = self._scan()
        try:
            values = orjson.loads(rest)
        except orjson.JSONDecodeError as e:
            raise Damaged(f"is not JSON: {e.msg}") from None
        text = string_of(values, key)
        if text in holes:
            return lambda: self._decoded(*holes[text])
        return lambda: iter([text])

    def _scan(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        """Return the line with names in place of long strings, and each name's start and end."""
        rest, holes = bytearray(), {}
        # The names are random, so that no string of the line can be mistaken for one.
        mark = uuid.uuid4().hex
        begun: int | None = None  # offset of the string that is being read
        base, window = 0, b""
        self._spool.seek(0)
        while block := self._spool.read(self._step):
            base, window, at = base, window + block, 0
            while at < len(window):
                if begun is None:
                    quote = window.find(b'"', at)
                    end = len(window) if quote < 0 else quote + 1
                    rest += window[at:end]
                    at = end
                    begun = None if quote < 0 else base + end
                else:
                    found = _INSIDE.match(window, at)
                    at = found.end() if found else at
                    if window[at : at + 1] != b'"':
                        break  # an escape is incomplete, or the window ends
                    if base + at - begun < _LONG_STRING:
                        rest += self._between(begun, base + at)
                    else:
                        name = f"{mark} {len(holes)}"
                        holes[name] = (begun, base + at)
                        rest += name.encode()
                    rest += b'"'
                    at += 1
                    begun = None
                if len(rest) > _MAX_REST:
                    raise Damaged(f"has more than {_MAX_REST} bytes beside its long strings")
            base, window = base + at, window[at:]
        if begun is not None:
            raise Damaged("is not JSON: a string has no end")
        return bytes(rest), holes

    def _between(self, start: int, end: int) -> bytes:
        here = self._spool.tell()
        self._spool.seek(start)
        data = self._spool.read(end - start)
        self._spool.seek(here)
        return data

    def _decoded(self, start: int, end: int) -> Iterator[str]:
        rest = b""
        while start < end:
            block = self._between(start, min(end, start + self._step))
            start += len(block)
            rest += block
            text, used = _longest_string(rest)
            if not used and (start == end or len(rest) > self._step):
                raise Damaged(f"is not JSON: bad UTF-8 or a bad escape near byte {start}")
            rest = rest[used:]
            yield text
        if rest:
            raise Damaged(f"is not JSON: bad UTF-8 or a bad escape near byte {end}")


def _longest_string(data: bytes) -> tuple[str, int]:
    """Decode as many of the bytes as possible; return the string and the number of bytes."""
    for left in range(min(_LONGEST_CHARACTER, len(data)) + 1):
        used = len(data) - left
        try:
            return orjson.loads(b'"' + data[:used] + b'"'), used
        except orjson.JSONDecodeError:
            continue
    return "", 0


def string_of(values: Any, key: str) -> str:
    """Return the string under `key` of a parsed line.

    Raises:
        Damaged: the line is not an object, or has no string under `key`.
    """
    if not isinstance(values, dict):
        raise Damaged(f"holds {json_kind(values)}, expected an object")
    if key not in values:
        raise Damaged(f"has no {key!r}, found {names(values)}")
    text = values[key]
    if not isinstance(text, str):
        raise Damaged(f"{key!r} is {json_kind(text)}, expected a string")
    return text


def names(keys: Iterable[str]) -> str:
    """Return the keys of an object, or the columns of a table, for an error message."""
    shown = [repr(key if len(key) <= _LONGEST_NAME else f"{key[:_LONGEST_NAME]}…") for key in keys]
    more = ", …" if len(shown) > _NAMES else ""
    return ", ".join(shown[:_NAMES]) + more if shown else "no key"


def json_kind(value: Any) -> str:
    """Return the name of a JSON value's type, with its article."""
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return kinds.get(type(value), "a number")
