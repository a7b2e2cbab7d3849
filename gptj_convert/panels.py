"""Tensors read piece by piece in the order the target stores them, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from crc32c import crc32c

from gptj_model.dtypes import NUMPY
from gptj_model.source import TensorSource, raw_bytes, read_rows
from gptj_model.tensors import Op

#: Bytes of source that are yielded at once.
PANEL_BYTES = 8 * 2**20
#: Bytes of a matrix that are held to be transposed; a larger one is read in strips of columns.
STRIP_BYTES = 128 * 2**20


class Panels:
    """One tensor, laid out by an op, as consecutive contiguous pieces.

    Iterating yields arrays in the source's dtype whose bytes, one after the other, are those
    of `op(tensor)`. Afterwards `crc` is the crc32c of the tensor's bytes as the source has them.
    """

    def __init__(self, source: TensorSource, name: str, op: Op) -> None:
        self._source = source
        self._name = name
        self._op = op
        self._info = source.tensors[name]
        self._dtype = NUMPY[self._info.dtype]
        self.crc = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        self.crc = 0
        if self._op is Op.COPY or len(self._info.shape) < 2:
            return self._rows(checksum=True)
        return self._columns()

    def _rows(self, *, checksum: bool) -> Iterator[np.ndarray]:
        shape = self._info.shape
        if not shape:
            values = read_rows(self._source, self._name, 0, None)
            self._count(values)
            yield values
            return
        row_bytes = max(1, math.prod(shape[1:]) * self._dtype.itemsize)
        step = max(1, PANEL_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            values = read_rows(self._source, self._name, start, min(start + step, shape[0]))
            if checksum:
                self._count(values)
            yield values

    def _columns(self) -> Iterator[np.ndarray]:
        rows, columns = self._info.shape
        column_bytes = rows * self._dtype.itemsize
        width = max(1, min(columns, STRIP_BYTES // column_bytes))
        if width < columns:
            # The strips below see the bytes out of order: one pass in order for the checksum.
            for _ in self._rows(checksum=True):
                pass
        step = max(1, PANEL_BYTES // column_bytes)
        for left in range(0, columns, width):
            right = min(left + width, columns)
            strip = self._strip(left, right)
            for start in range(0, right - left, step):
                yield np.ascontiguousarray(strip[:, start : start + step].T)

    def _strip(self, left: int, right: int) -> np.ndarray:
        rows, columns = self._info.shape
        if right - left == columns:
            strip = read_rows(self._source, self._name, 0, rows)
            self._count(strip)
            return strip
        strip = np.empty((rows, right - left), self._dtype)
        for r in range(rows):
            offset = (r * columns + left) * self._dtype.itemsize
            self._source.read_into(self._name, offset, raw_bytes(strip[r]))
        return strip

    def _count(self, values: np.ndarray) -> None:
        self.crc = crc32c(raw_bytes(values), self.crc)
