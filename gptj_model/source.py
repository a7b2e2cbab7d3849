"""Where tensors come from: the protocol that every checkpoint reader implements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gptj_model.dtypes import NUMPY
from gptj_model.op import Op


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header of a file says about one tensor."""

    dtype: str
    """Canonical name of the dtype, from `gptj_model.dtypes`."""
    shape: tuple[int, ...]
    storage_op: Op = Op.COPY
    """Op between the tensor and the array whose row-major bytes the file holds.

    `TRANSPOSE` marks a column-major matrix, as `torch.save` writes a transposed view.
    """

    @property
    def nbytes(self) -> int:
        """Size of the data, in bytes."""
        return math.prod(self.shape) * NUMPY[self.dtype].itemsize

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """Shape of the array whose row-major bytes the file holds."""
        return self.storage_op.shape(self.shape)

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape, which two tensors must share to be compared bit for bit."""
        return self.dtype, self.shape


class TensorSource(Protocol):
    """Tensors of one checkpoint under the names of its format, read by ranges."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the checkpoint, by name; no data is read."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with little-endian bytes of the tensor, starting at byte `offset`.

        The bytes are those of the row-major array that `TensorInfo.storage_op` leads to.

        Raises:
            FileFault: the file is shorter than its header says, or cannot be read.
        """
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def read_tensor(source: TensorSource, name: str) -> np.ndarray:
    """Return one whole tensor, in the dtype and memory order it is stored in."""
    info = source.tensors[name]
    values = np.empty(info.storage_shape, NUMPY[info.dtype])
    if values.size:
        source.read_into(name, 0, raw_bytes(values))
    return info.storage_op(values)


def read_rows(source: TensorSource, name: str, start: int, stop: int | None) -> np.ndarray:
    """Return rows start:stop of the first axis, or from start to the end, in the dtype they are
    stored in."""
    info = source.tensors[name]
    if not info.shape:
        return read_tensor(source, name)
    stop = info.shape[0] if stop is None else stop
    if info.storage_op is Op.TRANSPOSE:
        return _stored_columns(source, name, start, stop).T
    return _stored_rows(source, name, start, stop)


def read_columns(source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
    """Return columns start:stop of a matrix, in the dtype they are stored in."""
    if source.tensors[name].storage_op is Op.TRANSPOSE:
        return _stored_rows(source, name, start, stop).T
    return _stored_columns(source, name, start, stop)


def _stored_rows(source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
    """Return rows of the array in the file, which are one range of bytes."""
    info = source.tensors[name]
    dtype, inner = NUMPY[info.dtype], info.storage_shape[1:]
    values = np.empty((stop - start, *inner), dtype)
    if values.size:
        source.read_into(name, start * math.prod(inner) * dtype.itemsize, raw_bytes(values))
    return values


def _stored_columns(source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
    """Return columns of the matrix in the file, which are one range of bytes per row."""
    info = source.tensors[name]
    dtype = NUMPY[info.dtype]
    rows, columns = info.storage_shape
    values = np.empty((rows, stop - start), dtype)
    for row in range(rows):
        offset = (row * columns + start) * dtype.itemsize
        source.read_into(name, offset, raw_bytes(values[row]))
    return values


def raw_bytes(values: np.ndarray) -> memoryview:
    """Return the memory of a contiguous array as writable bytes."""
    return values.reshape(-1).view(np.uint8).data
