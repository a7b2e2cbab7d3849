"""Where tensors come from: the protocol every checkpoint reader fulfils."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gptj_model.dtypes import NUMPY


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    dtype: str
    """A canonical name of `gptj_model.dtypes`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data, in bytes."""
        return math.prod(self.shape) * NUMPY[self.dtype].itemsize


class TensorSource(Protocol):
    """Tensors of one checkpoint, by the names its format gives them, read by ranges."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor in the file, without reading data."""
        ...

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's little-endian row-major bytes from `offset` on.

        Raises:
            FileFault: the file is shorter than its header says, or cannot be read.
        """
        ...

    def close(self) -> None:
        """Release the files."""
        ...


def read_tensor(source: TensorSource, name: str) -> np.ndarray:
    """One whole tensor, in the dtype it is stored in."""
    return read_rows(source, name, 0, None)


def read_rows(source: TensorSource, name: str, start: int, stop: int | None) -> np.ndarray:
    """Rows start:stop of the first axis (None: to the end), in the dtype they are stored in."""
    info = source.tensors[name]
    dtype = NUMPY[info.dtype]
    if not info.shape:
        values = np.empty((), dtype)
        source.read_into(name, 0, raw_bytes(values))
        return values
    stop = info.shape[0] if stop is None else stop
    values = np.empty((stop - start, *info.shape[1:]), dtype)
    row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
    if values.size:
        source.read_into(name, start * row_bytes, raw_bytes(values))
    return values


def read_columns(source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
    """Columns start:stop of a matrix, in the dtype they are stored in."""
    info = source.tensors[name]
    dtype = NUMPY[info.dtype]
    rows, columns = info.shape
    values = np.empty((rows, stop - start), dtype)
    for row in range(rows):
        offset = (row * columns + start) * dtype.itemsize
        source.read_into(name, offset, raw_bytes(values[row]))
    return values


def raw_bytes(values: np.ndarray) -> memoryview:
    """The memory of a contiguous array, as bytes that may be written to."""
    return values.reshape(-1).view(np.uint8).data
