"""A checkpoint with an adapter merged into it, as a source of tensors like any other.

Rows are merged as they are read: W + scale · (B · A), each step in float32, as peft's
`merge_and_unload` does on a model loaded in float32. NumPy's product is a chain of fused
multiply-adds over the rank, in order, and so is torch's on Intel processors, where the results are
equal bit for bit; on AMD processors torch's MKL adds up in another order. A product with a single
row takes another routine, so at least two rows are computed together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gptj_convert.checkpoint.adapter_folder import PeftAdapter, Update
from gptj_convert.streams import strips
from gptj_model.dtypes import NUMPY
from gptj_model.op import Op
from gptj_model.source import (
    TensorInfo,
    TensorSource,
    raw_bytes,
    read_columns,
    read_rows,
    read_tensor,
)
from gptj_model.tensors import Scheme, Tensor

#: Dtype in which adapted kernels are computed and returned.
MERGED_DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class _Kernel:
    """An adapted kernel as the base stores it, and the two factors of its update."""

    base: str
    left: np.ndarray
    right: np.ndarray
    scale: np.float32


class MergedSource:
    """Tensors of a base model of which some are merged and some replaced.

    Args:
        base: source of the base model, closed with this one.
        scheme: naming scheme of the base.
        names: names in the base of every row of the table.
        adapter: open adapter, closed with this source.
    """

    def __init__(
        self,
        base: TensorSource,
        scheme: Scheme,
        names: Mapping[Tensor, str],
        adapter: PeftAdapter,
    ) -> None:
        self.base = base
        self._scheme = scheme
        self._adapter = adapter
        self._updates: dict[str, tuple[Tensor, Update]] = {}
        self._replaced: dict[str, tuple[Tensor, str]] = {}
        self._last: tuple[str, _Kernel] | None = None
        self.tensors: dict[str, TensorInfo] = dict(base.tensors)
        for row, own in names.items():
            stored = [name for name in (own, *row.copies(scheme)) if name in base.tensors]
            if found := adapter.replaced.get(row):
                dtype = adapter.source.tensors[found].dtype
                for name in stored:
                    self._replaced[name] = row, found
                    self.tensors[name] = TensorInfo(dtype, row.shape_in(scheme))
            if update := adapter.updates.get(row):
                for name in stored:
                    self._updates[name] = row, update
                    self.tensors[name] = TensorInfo(MERGED_DTYPE, row.shape_in(scheme))

    @property
    def memory(self) -> int:
        """Bytes that merging takes beside the buffer that is read into: two factors, and two panels
        of rows."""
        factors = (4 * u.rank * sum(row.shape) for row, u in self._updates.values())
        return max(factors, default=0) + 2 * strips.PANEL_BYTES

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Implement `TensorSource`."""
        if name not in self._updates and name not in self._replaced:
            self.base.read_into(name, offset, buffer)
            return
        info = self.tensors[name]
        if not buffer.nbytes:
            return
        columns = math.prod(info.shape[1:])
        row_bytes = columns * NUMPY[info.dtype].itemsize
        step = max(1, strips.PANEL_BYTES // row_bytes)
        done = 0
        while done < buffer.nbytes:
            start, within = divmod(offset + done, row_bytes)
            last = -(-(offset + buffer.nbytes) // row_bytes)
            rows = self._rows(name, start, min(start + step, last))
            part = raw_bytes(rows)[within : within + buffer.nbytes - done]
            buffer[done : done + part.nbytes] = part
            done += part.nbytes

    def close(self) -> None:
        """Close base and adapter."""
        self._last = None
        self._adapter.close()
        self.base.close()

    def _rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name not in self._updates:
            return self._replacement(name, start, stop)
        if stop - start == 1 < self.tensors[name].shape[0]:
            first = max(0, start - 1)
            return np.ascontiguousarray(self._rows(name, first, first + 2)[start - first :][:1])
        kernel = self._kernel(name)
        rows = self._base_rows(name, start, stop).astype(MERGED_DTYPE)
        update = kernel.left[start:stop] @ kernel.right
        update *= kernel.scale
        rows += update
        return rows

    def _base_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in self._replaced:
            return self._replacement(name, start, stop)
        return read_rows(self.base, name, start, stop)

    def _replacement(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows of the adapter's own tensor, in the base's layout."""
        row, found = self._replaced[name]
        source = self._adapter.source
        if row.op(Scheme.HF, self._scheme) is Op.COPY:
            return read_rows(source, found, start, stop)
        return np.ascontiguousarray(read_columns(source, found, start, stop).T)

    def _kernel(self, name: str) -> _Kernel:
        """Return the factors of a kernel's update, which are kept until those of another kernel are
        asked for."""
        last = self._last
        if last is None or last[0] != name:
            row, update = self._updates[name]
            a, b = (
                read_tensor(self._adapter.source, factor).astype(MERGED_DTYPE, copy=False)
                for factor in (update.a, update.b)
            )
            if row.op(Scheme.HF, self._scheme) is Op.TRANSPOSE:
                a, b = b.T, a.T
            last = name, _Kernel(name, b, a, np.float32(update.scale))
            self._last = last
        return last[1]
