"""The safetensors format: an 8-byte length, a JSON header, then the tensors' bytes.

Reading is by ranges, and stricter than the safetensors library on purpose: a header with duplicate
keys, gaps or overlaps is refused. Writing is by a layout, because the library needs the whole file
in memory.
"""

from __future__ import annotations

import json
import math
import reprlib
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gptj_convert.files.ranged_file import DOWNLOAD_HINT, RangedFile
from gptj_convert.formats.containers.layout import FileLayout
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo

#: safetensors' dtype codes ↔ canonical names.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in DTYPES.items()}

#: Limits on a header, which for a GPT-J of 28 blocks has 40 kB with 3,000 brackets and commas. A
#: header beyond them is not parsed: a parsed value takes far more memory than its text.
MAX_HEADER_BYTES = 16 * 2**20
MAX_MARKS = 2**18
MAX_DIMENSIONS = 8

#: Shows values of a header, shortened to a limited length and depth.
_shown = reprlib.Repr()
_shown.maxstring = 200

_METADATA = "__metadata__"


class SafetensorsSource:
    """Tensors of one file, as a `gptj_model.source.TensorSource`.

    Raises:
        FileFault: the header breaks a rule of the format; the message names the file, the tensor
            and the rule.
    """

    def __init__(self, path: Path) -> None:
        self._file = RangedFile(path)
        try:
            self._start, header = _read_header(self._file)
            self.tensors, self._offsets = _check(self._file, self._start, header)
        except BaseException:
            self._file.close()
            raise

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        begin = self._start + self._offsets[name]
        self._file.read_into(begin + offset, buffer, f"tensor {name!r}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def safetensors_file(
    name: str, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> FileLayout:
    """Return the layout of a new file.

    Args:
        name: name of the file.
        tensors: tensors in the file, in order.
        metadata: texts for the header.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for tensor, info in tensors.items():
        header[tensor] = {
            "dtype": _CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end := end + info.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return FileLayout(name, (struct.pack("<Q", len(text)) + text, *tensors))


def _read_header(file: RangedFile) -> tuple[int, dict[str, Any]]:
    if file.size < 8:
        raise FileFault(
            f"{file.path}: has {file.size} bytes, expected a header of at least 8",
            hint=DOWNLOAD_HINT,
        )
    (length,) = struct.unpack("<Q", file.read(0, 8, "the header's length"))
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise FileFault(
            f"{file.path}: header length is {length}, expected 2 to {MAX_HEADER_BYTES} bytes "
            "(is this a safetensors file?)"
        )
    if 8 + length > file.size:
        raise FileFault(
            f"{file.path}: header is {length} bytes, but the file has only {file.size}",
            hint=DOWNLOAD_HINT,
        )
    text = file.read(8, length, "the header")
    if sum(text.count(mark) for mark in b"[{,") > MAX_MARKS:
        raise FileFault(f"{file.path}: header holds more than {MAX_MARKS} values, expected fewer")
    try:
        # The format requires the brace; the json module would accept blanks before it.
        if not text.startswith(b"{"):
            raise ValueError("does not begin with '{'")
        header = json.loads(
            text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_int=_integer
        )
    except (ValueError, RecursionError) as e:
        raise FileFault(f"{file.path}: header is not valid JSON: {e}") from None
    return 8 + length, header


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        for text in (key, value):
            if isinstance(text, str):
                text.encode()  # Half of a surrogate pair is no text: a ValueError.
        if key in found:
            raise ValueError(f"key {_shown.repr(key)} occurs twice")
        found[key] = value
    return found


def _integer(text: str) -> int | float:
    """Parse a JSON integer; -0 is a float, as in the safetensors library."""
    return -0.0 if text == "-0" else int(text)


def _check(
    file: RangedFile, start: int, header: dict[str, Any]
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Return the tensors of a header and their offsets behind it, all rules checked."""
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileFault(f"{file.path}: {_METADATA} is not an object of strings")
    entries = []
    for name, entry in header.items():
        rule = _entry_fault(entry)
        if rule:
            raise FileFault(f"{file.path}: tensor {_shown.repr(name)}: {rule}")
        info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin != info.nbytes:
            raise FileFault(
                f"{file.path}: tensor {_shown.repr(name)}: data_offsets span {end - begin} bytes, "
                f"{info.dtype} of shape {list(info.shape)} needs {info.nbytes}"
            )
        entries.append((begin, end, name, info))
    position = 0
    for begin, end, name, _ in sorted(entries, key=lambda e: e[:2]):
        if begin != position:
            kind = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise FileFault(
                f"{file.path}: tensor {_shown.repr(name)}: {kind}: "
                f"begins at {begin}, expected {position}"
            )
        position = end
    if start + position != file.size:
        raise FileFault(
            f"{file.path}: has {file.size} bytes, its header calls for {start + position}",
            hint=DOWNLOAD_HINT,
        )
    tensors = {name: info for _, _, name, info in entries}
    return tensors, {name: begin for begin, _, name, _ in entries}


def _entry_fault(entry: Any) -> str | None:
    """Return the rule that a tensor's entry breaks, or None."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "its entry is not {dtype, shape, data_offsets}"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return f"dtype is {_shown.repr(entry['dtype'])}, expected one of {', '.join(DTYPES)}"
    for key in ("shape", "data_offsets"):
        value = entry[key]
        if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**63 for n in value):
            return f"{key} is {_shown.repr(value)}, expected a list of whole numbers from 0"
    if len(entry["shape"]) > MAX_DIMENSIONS:
        return f"has {len(entry['shape'])} dimensions, expected at most {MAX_DIMENSIONS}"
    # An empty tensor is checked, too: numpy has no array of such a shape.
    if (
        math.prod(max(n, 1) for n in entry["shape"]) * NUMPY[DTYPES[entry["dtype"]]].itemsize
        >= 2**63
    ):
        return f"shape {entry['shape']} overflows"
    if len(entry["data_offsets"]) != 2:
        return "data_offsets is not a pair"
    return None
