"""Layout of a new file in the format of torch.save, without PyTorch.

The zip archive is that of `torch.serialization.set_crc32_options(False)`: the place of every member
is known before the first byte is written, and no member has a CRC32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from gptj_convert.formats.containers.layout import FileLayout
from gptj_convert.formats.containers.torch_pickle import type_name
from gptj_convert.formats.containers.torch_zip import PICKLE, ZipEntry, end_of_zip, local_header
from gptj_model.source import TensorInfo

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}
#: Alignment of the data of a member in PyTorch's archives, in bytes.
_ALIGNMENT = 64


def archive_file(name: str, value: Any, tensors: Mapping[str, TensorInfo]) -> FileLayout:
    """Return the layout of a file that holds one value.

    Args:
        name: name of the file. As in PyTorch, its stem names the folder in the archive.
        value: value built of dicts, lists, tuples and plain values; a string that is a key of
            `tensors` stands for that tensor, and bytes stand for a float32 scalar.
        tensors: tensors by name; one whose `storage_op` is `TRANSPOSE` becomes a transposed view.
    """
    pickle = _Pickle(tensors)
    pickle.dump(value)
    folder = PurePath(name).stem
    members: list[tuple[str, bytes | str, int]] = [
        (PICKLE, pickle.data, len(pickle.data)),
        ("byteorder", b"little", 6),
    ]
    for key, (content, nbytes) in enumerate(pickle.storages):
        members.append((f"data/{key}", content, nbytes))
    members.append(("version", b"3\n", 2))
    parts: list[bytes | str] = []
    entries = []
    at = 0
    for member, content, nbytes in members:
        entry = ZipEntry(f"{folder}/{member}", nbytes, at)
        header = local_header(entry, alignment=_ALIGNMENT)
        parts += [header, content]
        entries.append(entry)
        at += len(header) + nbytes
    return FileLayout(name, (*parts, end_of_zip(entries, at)))


class _Pickle:
    """Writer of a data.pkl of plain values and tensors, in pickle protocol 2.

    Python's own pickler would have to import torch to refer to its functions.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._data = bytearray(b"\x80\x02")
        self.storages: list[tuple[bytes | str, int]] = []
        """Content and size in bytes of each storage."""

    @property
    def data(self) -> bytes:
        """Complete program."""
        return bytes(self._data) + b"."

    def dump(self, value: Any) -> None:
        match value:
            case None:
                self._data += b"N"
            case bool():
                self._data += b"\x88" if value else b"\x89"
            case int():
                self._int(value)
            case float():
                self._data += b"G" + struct.pack(">d", value)
            case bytes():
                self._tensor(value, TensorInfo("float32", ()))
            case str() if value in self._tensors:
                self._tensor(value, self._tensors[value])
            case str():
                self._string(value)
            case dict():
                self._data += b"}("
                for key, item in value.items():
                    if isinstance(key, str):  # a key never stands for a tensor
                        self._string(key)
                    else:
                        self.dump(key)
                    self.dump(item)
                self._data += b"u"
            case list():
                self._sequence(b"](", value, b"e")
            case tuple():
                self._sequence(b"(", value, b"t")
            case _:
                raise TypeError(f"{type_name(value)} is not a plain value")

    def _sequence(self, begin: bytes, items: Sequence[Any], end: bytes) -> None:
        self._data += begin
        for item in items:
            self.dump(item)
        self._data += end

    def _int(self, value: int) -> None:
        if 0 <= value < 2**8:
            self._data += b"K" + struct.pack("<B", value)
        elif -(2**31) <= value < 2**31:
            self._data += b"J" + struct.pack("<i", value)
        else:
            self._data += b"\x8a\x08" + struct.pack("<q", value)

    def _string(self, value: str) -> None:
        raw = value.encode()
        self._data += b"X" + struct.pack("<I", len(raw)) + raw

    def _tensor(self, content: bytes | str, info: TensorInfo) -> None:
        count, strides = 1, []
        for size in reversed(info.storage_shape):
            strides.insert(0, count)
            count *= size
        self._data += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self._string("storage")
        self._data += f"ctorch\n{_STORAGES[info.dtype]}\n".encode()
        self._string(str(len(self.storages)))
        self._string("cpu")
        self._int(count)
        self._data += b"tQ"
        for value in (0, info.shape, info.storage_op.shape(tuple(strides)), False):
            self.dump(value)
        self._data += b"ccollections\nOrderedDict\n)RtR"
        self.storages.append((content, info.nbytes))
