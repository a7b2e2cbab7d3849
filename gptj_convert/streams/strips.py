"""Tensors read piece by piece in the order in which the target stores them, in bounded memory.

There are two levels. A strip is what is read at once and held, as the source stores it: a run of
elements or, in a matrix that is to be transposed, a run of columns. A panel is what is handed on: a
flat array of the target's values that fits into the processor's cache. One strip becomes one or
more panels. The writer takes no panels; it fills its own blocks from the strips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c

from gptj_model.dtypes import NUMPY
from gptj_model.op import Op
from gptj_model.source import TensorInfo, TensorSource, raw_bytes
from gptj_model.transposition import transpose

#: Size of a panel, and of a strip that is not transposed, in bytes.
PANEL_BYTES = 8 * 2**20
#: Size of a strip that is transposed, in bytes; a larger matrix is read in several strips. The
#: feed-forward matrices of the 6B in float32 just fit.
STRIP_BYTES = 256 * 2**20
#: The number of columns of a strip is a multiple of this one, if it is larger.
_COLUMNS = 64
#: Largest strip that gets memory of its own instead of a buffer, in bytes. In a buffer, the bias
#: between two matrices would delay the reading of the second one.
SMALL_STRIP_BYTES = 2**20
#: Smallest number of strip buffers: one strip is laid out while the next is read.
STRIP_BUFFERS = 2
#: Size of all strip buffers together, in panels, where more than `STRIP_BUFFERS` fit: with more
#: buffers, reading and writing wait less for each other. `benchmarks/conversion.py` measures it.
_ALL_BUFFERS_PANELS = 8
#: Number of strip buffers for the converted side of a verification, whose strips are panels.
CONVERTED_STRIP_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class Strip:
    """Part of a tensor as its source stores it.

    The target's next values are those of `op(values)`.
    """

    values: np.ndarray
    op: Op

    @property
    def row_elements(self) -> int:
        """Number of the target's elements that are best written together."""
        return 1 if self.op is Op.COPY else self.values.shape[0]

    def fill(self, out: np.ndarray, begin: int) -> None:
        """Fill an array with elements of the flattened `op(values)`, rounded to its dtype.

        Args:
            out: one-dimensional array to fill.
            begin: index of the first element.
        """
        if self.op is Op.COPY:
            flat = self.values.reshape(-1)
            np.copyto(out, flat[begin : begin + out.size], casting="unsafe")
            return
        width = self.values.shape[0]
        at = 0
        while at < out.size:
            row, column = divmod(begin + at, width)
            rows = (out.size - at) // width
            if column or not rows:
                count = min(width - column, out.size - at)
                part = self.values[column : column + count, row]
                np.copyto(out[at : at + count], part, casting="unsafe")
            else:
                count = rows * width
                whole = out[at : at + count].reshape(rows, width)
                transpose(whole, self.values[:, row : row + rows])
            at += count


def stored_op(info: TensorInfo, op: Op) -> Op:
    """Return the op on the array in the file that amounts to `op` on the tensor."""
    return info.storage_op.then(op) if len(info.shape) > 1 else Op.COPY


def strip_sizes(info: TensorInfo, op: Op) -> list[int]:
    """Return the size in bytes of each strip of a tensor, in order."""
    width = NUMPY[info.dtype].itemsize
    if stored_op(info, op) is Op.COPY:
        step = max(PANEL_BYTES // width, 1) * width
    else:
        column = max(info.storage_shape[0] * width, 1)
        columns = max(STRIP_BYTES // column, 1)
        # The rows of a strip then begin at whole words, which `transpose` is fastest with.
        if columns > _COLUMNS:
            columns -= columns % _COLUMNS
        step = columns * column
    return [min(step, info.nbytes - begin) for begin in range(0, info.nbytes, step)]


def strip_bytes(info: TensorInfo, op: Op) -> int:
    """Return the size in bytes of the largest strip of a tensor."""
    return max(strip_sizes(info, op), default=0)


def strip_buffers(largest: int) -> int:
    """Return the number of strip buffers of a conversion, by the largest strip's size in bytes."""
    return max(STRIP_BUFFERS, _ALL_BUFFERS_PANELS * PANEL_BYTES // max(largest, PANEL_BYTES))


class Strips:
    """Strips of one tensor, in the order of the target.

    Args:
        source: checkpoint that holds the tensor.
        name: name of the tensor in the source.
        op: op from the tensor to its form in the target.
        buffer: function that returns uint8 memory for a strip of the given size, at most
            `strip_bytes`; by default, new memory.
        observe: function that is called with every part of the tensor once, in the source's dtype.
        deferred: whether the caller itself will `record` every strip, in order, if
            `are_contiguous`.

    Attributes:
        crc: crc32c of the tensor's bytes as the source has them, once all strips have been read.
        are_contiguous: whether the strips are the tensor's bytes in the order of the source.
    """

    def __init__(
        self,
        source: TensorSource,
        name: str,
        op: Op,
        *,
        buffer: Callable[[int], np.ndarray] | None = None,
        observe: Callable[[np.ndarray], None] | None = None,
        deferred: bool = False,
    ) -> None:
        self._source = source
        self._name = name
        self._info = source.tensors[name]
        self._dtype = NUMPY[self._info.dtype]
        self._op = stored_op(self._info, op)
        self._sizes = strip_sizes(self._info, op)
        self._buffer = buffer or _new_memory
        self._observe = observe
        self.are_contiguous = self._op is Op.COPY or len(self._sizes) == 1
        self._deferred = deferred and self.are_contiguous
        self.crc = 0

    def __iter__(self) -> Iterator[Strip]:
        self.crc = 0
        return self._rows() if self._op is Op.COPY else self._columns()

    def _rows(self) -> Iterator[Strip]:
        """Yield runs of the tensor's elements."""
        begin = 0
        for size in self._sizes:
            values = self._memory((size // self._dtype.itemsize,))
            self._source.read_into(self._name, begin, raw_bytes(values))
            if not self._deferred:
                self.record(values)
            yield Strip(values, Op.COPY)
            begin += size

    def _columns(self) -> Iterator[Strip]:
        """Yield runs of a matrix's columns."""
        rows, columns = self._info.storage_shape
        sizes = self._sizes
        if not sizes:
            return
        if len(sizes) == 1:
            values = self._memory((rows, columns))
            self._source.read_into(self._name, 0, raw_bytes(values))
            if not self._deferred:
                self.record(values)
            yield Strip(values, self._op)
            return
        # Every strip reads whole rows: the disk delivers them faster than parts of rows.
        row_bytes = columns * self._dtype.itemsize
        scratch = np.empty((min(rows, max(1, PANEL_BYTES // row_bytes)), columns), self._dtype)
        left = 0
        for size in sizes:
            width = size // (rows * self._dtype.itemsize)
            values = self._memory((rows, width))
            for top in range(0, rows, len(scratch)):
                part = scratch[: rows - top]
                self._source.read_into(self._name, top * row_bytes, raw_bytes(part))
                if left == 0:
                    self.record(part)
                values[top : top + len(scratch)] = part[:, left : left + width]
            yield Strip(values, self._op)
            left += width

    def _memory(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape) * self._dtype.itemsize
        return self._buffer(size)[:size].view(self._dtype).reshape(shape)

    def record(self, values: np.ndarray) -> None:
        """Add a part of the tensor to `crc`, and pass it to `observe`."""
        self.crc = crc32c(raw_bytes(values), self.crc)
        if self._observe:
            self._observe(values)


def _new_memory(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


class Panels:
    """Panels of one tensor: consecutive flat arrays of at most `PANEL_BYTES`.

    Iterating yields arrays in the source's dtype whose bytes, joined, are those of `op(tensor)`.
    Each array is valid until the next one is requested.

    Args:
        source: checkpoint that holds the tensor.
        name: name of the tensor in the source.
        op: op from the tensor to its form in the target.
    """

    def __init__(self, source: TensorSource, name: str, op: Op) -> None:
        info = source.tensors[name]
        self._dtype = NUMPY[info.dtype]
        # Not an attribute: the cycle through the lambda would keep the memory until the next
        # garbage collection.
        memory = np.empty(strip_bytes(info, op), np.uint8)
        self._strips = Strips(source, name, op, buffer=lambda size: memory)

    @property
    def crc(self) -> int:
        """crc32c of the tensor's bytes as the source has them, once all panels have been read."""
        return self._strips.crc

    def __iter__(self) -> Iterator[np.ndarray]:
        return in_panels(self._strips, self._dtype)


def in_panels(strips: Iterable[Strip], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the target's values as panels: flat arrays of at most `PANEL_BYTES`.

    Each array is valid until the next one is requested.

    Args:
        strips: strips of one tensor, in order.
        dtype: dtype that the values are rounded to.
    """
    step = max(1, PANEL_BYTES // dtype.itemsize)
    panel = np.empty(0, dtype)
    for strip in strips:
        if strip.op is Op.COPY and strip.values.dtype == dtype:
            yield strip.values
            continue
        needed = min(step, strip.values.size)
        if panel.size < needed:
            panel = np.empty(needed, dtype)
        for begin in range(0, strip.values.size, step):
            part = panel[: min(step, strip.values.size - begin)]
            with np.errstate(over="ignore", invalid="ignore"):
                strip.fill(part, begin)
            yield part
