"""PyTorch checkpoints such as `pytorch_model.bin`, read without PyTorch or running their code.

torch.save (1.6 and later) writes a zip archive (see `torch_zip`) with one `data.pkl` (see
`torch_pickle`) and one member per storage, a range of elements that tensors are views of. A view
may have any strides with which no two elements share a place. A matrix whose columns are
contiguous, such as a transposed weight, is read in its stored order (`TensorInfo.storage_op`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptj_convert.files.ranged_file import RangedFile
from gptj_convert.formats.containers.strided import StridedView, gather
from gptj_convert.formats.containers.torch_pickle import (
    MAX_PICKLE_BYTES,
    STATE_DICT_HINT,
    PickledTensor,
    read_pickle,
    type_name,
)
from gptj_convert.formats.containers.torch_zip import RESAVE_HINT, Member, TorchZip
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo

_log = logging.getLogger(__name__)

MAX_DIMENSIONS = 8


class TorchCheckpointSource:
    """Tensors of a file that torch.save wrote, as a `gptj_model.source.TensorSource`.

    Attributes:
        checksummed: whether the archive records CRC32s, which `crc_faults` needs.

    Raises:
        FileFault: the file is not a dict of tensors in the format of torch.save; the message names
            the member, the tensor or the byte of data.pkl, and what was expected.
    """

    def __init__(self, path: Path) -> None:
        self._file = RangedFile(path)
        try:
            self._zip = TorchZip(self._file)
            self.checksummed = self._zip.checksummed
            self.tensors: dict[str, TensorInfo] = {}
            self._places: dict[str, tuple[Member, StridedView]] = {}
            values = read_pickle(self._zip.pickle(MAX_PICKLE_BYTES), path)
            for name, value in self._named(values).items():
                self._add(name, value)
        except BaseException:
            self._file.close()
            raise

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        member, view = self._places[name]
        what, itemsize = f"tensor {name!r}", NUMPY[self.tensors[name].dtype].itemsize

        def read(at: int, memory: memoryview) -> None:
            self._file.read_into(member.begin + at, memory, what)

        gather(read, view, itemsize, offset, buffer)

    def crc_faults(self) -> Iterator[tuple[int, str | None]]:
        """Read all storages, and yield the size of each and, if its CRC32 is wrong, a message.

        Raises:
            FileFault: a storage cannot be read.
        """
        users: dict[Member, list[str]] = {}
        for name, (member, _) in self._places.items():
            users.setdefault(member, []).append(name)
        for member, names in users.items():
            fault = self._zip.crc_fault(member)
            shared = f" and {len(names) - 1} more" if len(names) > 1 else ""
            place = f"{names[0]!r}{shared} (member {member.name!r})"
            yield member.size, f"{place}: {fault}" if fault else None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _named(self, values: dict[str, Any]) -> Mapping[str, Any]:
        """Return the tensors by name.

        A training script may have saved the state dict as one entry among others.
        """
        inner = {key: value for key, value in values.items() if _is_state_dict(value)}
        if len(inner) != 1 or any(isinstance(v, PickledTensor) for v in values.values()):
            return values
        ((key, found),) = inner.items()
        others = ", ".join(repr(k) for k in values if k != key)
        _log.warning(
            "%s: reading the tensors under the key %r%s",
            *(self._file.path, key, f"; ignoring {others}" if others else ""),
        )
        return found

    def _add(self, name: Any, value: Any) -> None:
        """Add a tensor whose claims agree with the archive."""
        if not isinstance(name, str):
            raise FileFault(
                f"{self._file.path}: a dict's key is of type {type_name(name)}, expected the "
                "name of a tensor",
                hint=STATE_DICT_HINT,
            )
        where = f"{self._file.path}: tensor {name!r}"
        if not isinstance(value, PickledTensor):
            raise FileFault(
                f"{self._file.path}: entry {name!r} is of type {type_name(value)}, "
                "expected a tensor",
                hint=STATE_DICT_HINT,
            )
        rule = _tensor_fault(value)
        if rule:
            raise FileFault(f"{where}: {rule}", hint=RESAVE_HINT)
        storage, itemsize = value.storage, NUMPY[value.storage.dtype].itemsize
        member = self._zip.members.get(f"data/{storage.key}")
        if member is None:
            raise FileFault(f"{where}: its storage {storage.key!r} is not in the archive")
        if member.size != storage.numel * itemsize:
            raise FileFault(
                f"{where}: its storage {member.name!r} has {member.size} bytes, expected "
                f"{storage.numel * itemsize} ({storage.numel} of {storage.dtype})"
            )
        op, view = _view(value).in_storage_order()
        self.tensors[name] = TensorInfo(storage.dtype, value.shape, op)
        self._places[name] = member, view.merged()


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(v, PickledTensor) for v in value.values())
    )


def _view(tensor: PickledTensor) -> StridedView:
    return StridedView(tensor.offset, tensor.shape, tensor.strides)


def _tensor_fault(tensor: PickledTensor) -> str | None:
    """Return why a tensor is not a valid view of its storage, or None."""
    shape, strides, numel = tensor.shape, tensor.strides, tensor.storage.numel
    if len(shape) > MAX_DIMENSIONS or len(shape) != len(strides):
        return (
            f"has {len(shape)} dimensions and {len(strides)} strides, expected the same "
            f"number of both, at most {MAX_DIMENSIONS}"
        )
    # Types first: a value that is not a number may be too deep to compare or to show.
    claims = (numel, tensor.offset, *shape, *strides)
    if not all(type(n) is int for n in claims):
        return "its shape, strides, offset or storage size are not whole numbers"
    if not all(0 <= n < 2**63 for n in claims):
        return (
            f"shape {list(shape)}, strides {list(strides)}, offset {tensor.offset} and storage "
            f"size {numel} are not all from 0 to 2**63"
        )
    # An empty tensor is checked, too: numpy has no array of such a shape.
    if math.prod(max(n, 1) for n in shape) * NUMPY[tensor.storage.dtype].itemsize >= 2**63:
        return f"shape {list(shape)} overflows"
    view = _view(tensor)
    if tensor.offset + view.extent > numel:
        return (
            f"shape {list(shape)} with strides {list(strides)} from offset {tensor.offset} spans "
            f"{view.extent} elements, but its storage has only {numel}"
        )
    if view.overlap:
        return f"shape {list(shape)} has strides {list(strides)}: {view.overlap}"
    return None
