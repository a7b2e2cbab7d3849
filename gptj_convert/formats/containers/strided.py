"""Tensors that are views of a larger storage: their checks, and the reading of their elements.

`torch.save` writes whole storages, and for each tensor its offset in a storage and its stride along
each axis. A transposed weight, a slice of rows or columns, and a part of a fused projection are all
such views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gptj_model.op import Op
from gptj_model.source import raw_bytes

#: Number of bytes of storage that are read at once to pick elements from; they fit the L2 cache.
SCRATCH_BYTES = 2**20
#: Smallest run that is read by itself if the bytes next to it are not part of the tensor, in bytes:
#: from there on, a system call costs less than reading bytes that are not needed.
_RUN_BYTES = 4096

#: Strides of a merged view whose elements, in row-major order, are one range of the storage.
_ONE_RANGE = ((), (1,))

Read = Callable[[int, memoryview], None]
"""Function that fills memory with the bytes of a storage from an offset on."""


@dataclass(frozen=True, slots=True)
class StridedView:
    """Tensor as a view of a storage; offset and strides count elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Number of elements of the storage from the view's first element to its last."""
        return _extent(self.shape, self.strides)

    @property
    def overlap(self) -> str | None:
        """Reason why two elements may share a place in the storage, or None if they cannot."""
        axes = [(s, n) for n, s in zip(self.shape, self.strides, strict=True) if n > 1]
        if 0 in self.shape:
            return None
        if any(stride == 0 for stride, _ in axes):
            return "an axis of stride 0 repeats its elements"
        axes.sort()
        extent = 1
        nested = True
        for stride, n in axes:
            nested = nested and stride >= extent
            extent += (n - 1) * stride
        if nested or (len(axes) == 2 and not _meet(*axes)):
            return None
        return "its elements overlap in the storage"

    def in_storage_order(self) -> tuple[Op, StridedView]:
        """Return the view of the same elements whose last axis is the densest, and the op from it.

        Only a matrix is ever transposed, and only if neither axis has a single element.
        """
        if len(self.shape) == 2 and min(self.shape) > 1 and self.strides[0] < self.strides[1]:
            view = StridedView(self.offset, self.shape[::-1], self.strides[::-1])
            return Op.TRANSPOSE, view
        return Op.COPY, self

    def merged(self) -> StridedView:
        """Return the view of the same elements in the same order with the fewest axes."""
        shape: list[int] = []
        strides: list[int] = []
        for n, stride in zip(self.shape, self.strides, strict=True):
            if n == 1:
                continue
            if shape and strides[-1] == n * stride:
                shape[-1] *= n
                strides[-1] = stride
            else:
                shape.append(n)
                strides.append(stride)
        return StridedView(self.offset, tuple(shape), tuple(strides))


def gather(read: Read, view: StridedView, itemsize: int, offset: int, buffer: memoryview) -> None:
    """Fill a buffer with row-major bytes of a view.

    At most `SCRATCH_BYTES` of the storage are in memory at a time.

    Args:
        read: function that reads bytes of the storage.
        view: merged view to read.
        itemsize: size of an element, in bytes.
        offset: position of the first byte in the view's row-major bytes; it may lie inside an
            element.
        buffer: memory to fill, no longer than the rest of the view.
    """
    if view.strides in _ONE_RANGE:
        read(view.offset * itemsize + offset, buffer)
        return
    bits = np.dtype(f"u{itemsize}")
    first, skip = divmod(offset, itemsize)
    if not skip and len(buffer) % itemsize == 0:
        _fill(read, view, np.frombuffer(buffer, bits), first)
        return
    whole = np.empty(-(-(skip + len(buffer)) // itemsize), bits)
    _fill(read, view, whole, first)
    buffer[:] = raw_bytes(whole)[skip : skip + len(buffer)]


def _fill(read: Read, view: StridedView, out: np.ndarray, begin: int) -> None:
    """Fill an array with elements of a view from `begin` on, in row-major order."""
    if not out.size:
        return
    if view.strides in _ONE_RANGE:
        read((view.offset + begin) * out.itemsize, raw_bytes(out))
        return
    row_size = math.prod(view.shape[1:])
    at = 0
    while at < out.size:
        row, inside = divmod(begin + at, row_size)
        rows = (out.size - at) // row_size
        if inside or not rows or (count := _rows_at_once(view, out.itemsize)) == 0:
            size = min(row_size - inside, out.size - at)
            _fill(read, _row(view, row), out[at : at + size], inside)
        else:
            rows = min(rows, count)
            size = rows * row_size
            _pick(read, view, row, rows, out[at : at + size])
        at += size


def _row(view: StridedView, row: int) -> StridedView:
    return StridedView(view.offset + row * view.strides[0], view.shape[1:], view.strides[1:])


def _rows_at_once(view: StridedView, itemsize: int) -> int:
    """Return the number of rows to read in one range; 0 if each row is better read by itself."""
    stride = view.strides[0]
    extent = _extent(view.shape[1:], view.strides[1:])
    if extent * itemsize >= _RUN_BYTES and stride >= 2 * extent:
        return 0
    room = SCRATCH_BYTES // itemsize - extent
    return room // stride + 1 if room >= 0 else 0


def _pick(read: Read, view: StridedView, row: int, rows: int, out: np.ndarray) -> None:
    """Fill an array with rows of a view, picked from the range that holds them."""
    shape = (rows, *view.shape[1:])
    scratch = np.empty(_extent(shape, view.strides), out.dtype)
    read((view.offset + row * view.strides[0]) * out.itemsize, raw_bytes(scratch))
    strides = [stride * out.itemsize for stride in view.strides]
    out.reshape(shape)[...] = np.lib.stride_tricks.as_strided(scratch, shape, strides)


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Return whether two different steps along two axes (stride, size) lead to the same place.

    They do if a · i = b · j for steps within both axes; the smallest such steps are i = b / gcd and
    j = a / gcd.
    """
    common = math.gcd(a[0], b[0])
    return b[0] // common < a[1] and a[0] // common < b[1]
