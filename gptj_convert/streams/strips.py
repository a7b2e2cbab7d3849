"""Tensors read piece by piece in the order the target stores them, in bounded memory.

A strip is what is read at once: rows of the tensor or, to be transposed, columns. From strips
the target's bytes are laid out in whatever portions the writer takes.
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

#: Bytes of source that are yielded at once.
PANEL_BYTES = 8 * 2**20
#: Bytes of a matrix that are held to be transposed; a larger one is read in strips of columns.
#: The 6B's feed-forward matrices in float32 just fit.
STRIP_BYTES = 256 * 2**20
#: Columns of a strip are a multiple of this number, where it has more.
_COLUMNS = 64
#: A strip up to this size has memory of its own: in the place of a large one, as between two
#: matrices the bias is, it would keep the next one from being read.
SMALL_STRIP_BYTES = 2**20
#: Strips that go around in a conversion: one is laid out while the next is read.
STRIP_BUFFERS = 2
#: Where strips are panels, more of them go around, up to so many bytes: reading and writing then
#: wait less for each other.
_AROUND_BYTES = 64 * 2**20
#: The same of a converted checkpoint in a verification, where each is a panel.
CONVERTED_STRIP_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class Strip:
    """Part of a tensor as its source stores it; `op` of it comes next in the target."""

    values: np.ndarray
    op: Op

    @property
    def row_elements(self) -> int:
        """Elements of the target that are best written together."""
        return 1 if self.op is Op.COPY else self.values.shape[0]

    def fill(self, out: np.ndarray, begin: int) -> None:
        """Write elements from `begin` on of the flattened `op(values)` to all of `out` (1-D).

        The values are rounded to the dtype of `out`.
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
    """What is done to the array that the file holds, so that `op` is done to the tensor."""
    return info.storage_op.then(op) if len(info.shape) > 1 else Op.COPY


def strip_sizes(info: TensorInfo, op: Op) -> list[int]:
    """Bytes of every strip of such a tensor, in order."""
    width = NUMPY[info.dtype].itemsize
    if stored_op(info, op) is Op.COPY:
        step = max(PANEL_BYTES // width, 1) * width
    else:
        column = max(info.storage_shape[0] * width, 1)
        columns = max(STRIP_BYTES // column, 1)
        # A strip's rows then begin with whole words, as `transpose` is fastest with.
        if columns > _COLUMNS:
            columns -= columns % _COLUMNS
        step = columns * column
    return [min(step, info.nbytes - begin) for begin in range(0, info.nbytes, step)]


def strip_bytes(info: TensorInfo, op: Op) -> int:
    """Bytes of the largest strip of such a tensor."""
    return max(strip_sizes(info, op), default=0)


def strip_buffers(largest: int) -> int:
    """Number of strips that go around in a conversion, by the bytes of the largest."""
    return max(STRIP_BUFFERS, min(_AROUND_BYTES // PANEL_BYTES, _AROUND_BYTES // max(largest, 1)))


class Strips:
    """One tensor, laid out by an op, as consecutive strips.

    Args:
        source, name: of the tensor.
        op: what is to be done to it.
        buffer: gives memory (uint8) for a strip of at most `strip_bytes`; by default new memory.
        look: is shown every part of the tensor once, in the source's dtype.
        deferred: leave it to the caller to `count` every strip, in order, where `are_parts`.

    Attributes:
        crc: afterwards the crc32c of the tensor's bytes as the source has them.
        are_parts: whether the strips are the tensor's bytes as they come, one after the other.
    """

    def __init__(
        self,
        source: TensorSource,
        name: str,
        op: Op,
        *,
        buffer: Callable[[int], np.ndarray] | None = None,
        look: Callable[[np.ndarray], None] | None = None,
        deferred: bool = False,
    ) -> None:
        self._source = source
        self._name = name
        self._info = source.tensors[name]
        self._dtype = NUMPY[self._info.dtype]
        self._op = stored_op(self._info, op)
        self._sizes = strip_sizes(self._info, op)
        self._buffer = buffer or _new_memory
        self._look = look
        self.are_parts = self._op is Op.COPY or len(self._sizes) == 1
        self._deferred = deferred and self.are_parts
        self.crc = 0

    def __iter__(self) -> Iterator[Strip]:
        self.crc = 0
        return self._rows() if self._op is Op.COPY else self._columns()

    def _rows(self) -> Iterator[Strip]:
        """Consecutive elements of the tensor, whole ones."""
        begin = 0
        for size in self._sizes:
            values = self._memory((size // self._dtype.itemsize,))
            self._source.read_into(self._name, begin, raw_bytes(values))
            if not self._deferred:
                self.count(values)
            yield Strip(values, Op.COPY)
            begin += size

    def _columns(self) -> Iterator[Strip]:
        rows, columns = self._info.storage_shape
        sizes = self._sizes
        if not sizes:
            return
        if len(sizes) == 1:
            values = self._memory((rows, columns))
            self._source.read_into(self._name, 0, raw_bytes(values))
            if not self._deferred:
                self.count(values)
            yield Strip(values, self._op)
            return
        # Whole rows are read for every strip: the disk gives them faster than parts of them.
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
                    self.count(part)
                values[top : top + len(scratch)] = part[:, left : left + width]
            yield Strip(values, self._op)
            left += width

    def _memory(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape) * self._dtype.itemsize
        return self._buffer(size)[:size].view(self._dtype).reshape(shape)

    def count(self, values: np.ndarray) -> None:
        """Add a part of the tensor to `crc`, and show it to `look`."""
        self.crc = crc32c(raw_bytes(values), self.crc)
        if self._look:
            self._look(values)


def _new_memory(size: int) -> np.ndarray:
    return np.empty(size, np.uint8)


class Panels:
    """One tensor, laid out by an op, as consecutive flat arrays of at most PANEL_BYTES.

    Iterating yields arrays in the source's dtype whose bytes, one after the other, are those
    of `op(tensor)`; each holds until the next is asked for. Afterwards `crc` is the crc32c of
    the tensor's bytes as the source has them.
    """

    def __init__(self, source: TensorSource, name: str, op: Op) -> None:
        info = source.tensors[name]
        self._dtype = NUMPY[info.dtype]
        # Not an attribute: a cycle through the lambda would keep it until the next collection.
        memory = np.empty(strip_bytes(info, op), np.uint8)
        self._strips = Strips(source, name, op, buffer=lambda size: memory)

    @property
    def crc(self) -> int:
        """See the class."""
        return self._strips.crc

    def __iter__(self) -> Iterator[np.ndarray]:
        return in_panels(self._strips, self._dtype)


def in_panels(strips: Iterable[Strip], dtype: np.dtype) -> Iterator[np.ndarray]:
    """The target's values as consecutive flat arrays of at most PANEL_BYTES, rounded to a dtype.

    Each holds until the next is asked for.
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
