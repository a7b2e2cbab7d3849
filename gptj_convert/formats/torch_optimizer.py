"""`optimizer.pt`, the state dict of a PyTorch optimizer, without PyTorch: read, and laid out.

What is written is the zip archive that torch.save writes with
`torch.serialization.set_crc32_options(False)`: every member's place is known before the first
byte, and none has a CRC32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from gptj_convert.formats.layout import FileLayout
from gptj_convert.formats.pickle import PickleSource
from gptj_convert.formats.torch_pickle import PickledTensor, kind_of
from gptj_convert.formats.torch_zip import PICKLE, ZipEntry, end_of_zip, local_header
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo

OPTIMIZER_FILE = "optimizer.pt"

#: Names of the tensors of state: this, the parameter's number, and the key.
_PREFIX = "optimizer.state."
_FOLDER = "optimizer/"
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}
#: As PyTorch aligns the data of a member.
_ALIGNMENT = 64

#: State by the number of the parameter, and the groups that say which are together.
State = Mapping[int, Mapping[str, Any]]
Groups = Sequence[Mapping[str, Any]]


class OptimizerSource(PickleSource):
    """The tensors of an optimizer's state, as `optimizer.state.NUMBER.KEY`.

    Attributes:
        plain: what is no tensor, by such a name.
        groups: the optimizer's param_groups.
        more: the other keys of the state dict.

    Raises:
        FileFault: see `PickleSource`; or it is not an optimizer's state dict.
    """

    _keys = (str, int)

    def _named(self, values: dict[str, Any]) -> Mapping[str, Any]:
        self.plain: dict[str, Any] = {}
        self.more = dict(values)
        state, self.groups = (self.more.pop(key, None) for key in ("state", "param_groups"))
        if not (_is_state(state) and _is_groups(self.groups)):
            raise FileFault(
                f"{self._file.path}: is not an optimizer's state dict, expected `state` by the "
                "number of the parameter, and `param_groups` with their numbers",
                hint="save it so: torch.save(optimizer.state_dict(), 'optimizer.pt')",
            )
        named = {f"{_PREFIX}{n}.{k}": v for n, entry in state.items() for k, v in entry.items()}
        self.plain = {k: v for k, v in named.items() if not isinstance(v, PickledTensor)}
        return {k: v for k, v in named.items() if k not in self.plain}


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(n) is int and isinstance(entry, dict) for n, entry in value.items()
    )


def _is_groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(type(n) is int for n in group["params"])
        for group in value
    )


def optimizer_file(
    state: State, groups: Groups, more: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> FileLayout:
    """A new optimizer.pt.

    Args:
        state: by the parameter's number, what it keeps: a tensor's name, or the bytes of a
            float32 scalar.
        groups: param_groups, of plain values.
        more: further keys of the state dict, of plain values.
        tensors: by those names.
    """
    pickle = _Pickle(tensors)
    pickle.dump({"state": dict(state), "param_groups": list(groups), **more})
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
    for name, content, nbytes in members:
        entry = ZipEntry(_FOLDER + name, nbytes, at)
        header = local_header(entry, alignment=_ALIGNMENT)
        parts += [header, content]
        entries.append(entry)
        at += len(header) + nbytes
    return FileLayout(OPTIMIZER_FILE, (*parts, end_of_zip(entries, at)))


class _Pickle:
    """Writes the data.pkl of plain values and tensors, in pickle protocol 2.

    Python's own pickler would have to import torch to name its functions.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self._data = bytearray(b"\x80\x02")
        self.storages: list[tuple[bytes | str, int]] = []
        """Content of each, and its size in bytes."""

    @property
    def data(self) -> bytes:
        """The program, ended."""
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
                    self.dump(key)
                    self.dump(item)
                self._data += b"u"
            case list():
                self._sequence(b"](", value, b"e")
            case tuple():
                self._sequence(b"(", value, b"t")
            case _:
                raise TypeError(f"no plain value: {kind_of(value)}")

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
        for size in reversed(info.shape):
            strides.insert(0, count)
            count *= size
        self._data += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self._string("storage")
        self._data += f"ctorch\n{_STORAGES[info.dtype]}\n".encode()
        self._string(str(len(self.storages)))
        self._string("cpu")
        self._int(count)
        self._data += b"tQ"
        for value in (0, info.shape, tuple(strides), False):
            self.dump(value)
        self._data += b"ccollections\nOrderedDict\n)RtR"
        self.storages.append((content, info.nbytes))
