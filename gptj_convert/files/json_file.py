"""Strict reading of JSON objects from other programs: bounded size, no duplicate keys."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptj_convert.files.ranged_file import DOWNLOAD_HINT, RangedFile
from gptj_model.errors import FileFault

_shown = reprlib.Repr()
_shown.maxstring = 200


def read_json(path: Path, *, expected: str, max_bytes: int, max_marks: int) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        path: path of the file.
        expected: what the file should be, in words for errors.
        max_bytes: limit on the file's size, in bytes.
        max_marks: limit on the number of values; see `parse_json`.

    Raises:
        FileFault: the file cannot be read or is too large, or `parse_json` refuses it.
    """
    file = RangedFile(path, expected)
    try:
        if file.size > max_bytes:
            raise FileFault(
                f"{path}: has {file.size} bytes, expected {expected} of at most {max_bytes}",
                hint=DOWNLOAD_HINT,
            )
        data = file.read(0, file.size, expected)
    finally:
        file.close()
    return parse_json(data, where=str(path), max_marks=max_marks)


def parse_json(data: bytes, *, where: str, max_marks: int) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: the text, in UTF-8.
        where: name of the file that the text came from, for errors.
        max_marks: limit on the number of brackets, braces and commas: a parsed value takes far
            more memory than its text.

    Raises:
        FileFault: the text is not JSON, is not an object, has too many values, or has the same
            key twice.
    """
    if sum(data.count(mark) for mark in b"[{,") > max_marks:
        raise FileFault(
            f"{where}: holds more than {max_marks} values, expected fewer",
            hint=DOWNLOAD_HINT,
        )
    try:
        values = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as e:
        raise FileFault(f"{where}: is not valid JSON: {e}", hint=DOWNLOAD_HINT) from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise FileFault(f"{where}: holds a JSON {found}, expected an object", hint=DOWNLOAD_HINT)
    return values


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {_shown.repr(key)} occurs twice")
        found[key] = value
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")
