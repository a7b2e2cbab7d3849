"""Buffers that blocks are read into, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptj_model.config import GPTJConfig
from gptj_model.op import Op
from gptj_model.page_buffers import page_arrays, page_buffers, whole_pages
from gptj_model.source import TensorInfo, TensorSource, raw_bytes
from gptj_model.tensors import Scheme, Tensor, block
from gptj_model.transposition import transpose


@dataclass(eq=False, slots=True)
class _Place:
    """Memory of one block as it is stored."""

    memory: np.ndarray
    holds: tuple[TensorSource, int] | None = None
    """Source and block number of the values in it."""


class BlockBuffers:
    """Buffers of the block that computes and of the next one, which is prefetched.

    Weights stored as they are computed with, in float32 and Keras' layout, are read into two
    buffers in turn; the two blocks read last stay available for a pass in the other direction.
    Other weights have one buffer in the stored form, which in 16 bits is half as large, and one in
    the computed form.

    Memory is requested from the system only once, which provides a page at its first use;
    page-aligned buffers are read from disk without a copy.

    Args:
        config: configuration of the model.
        scheme: naming scheme and layout of what is read.
        tensors: dtype and shape of the stored tensors, by their names in the scheme.

    Raises:
        MemoryFault: the system does not provide the memory.
    """

    def __init__(
        self, config: GPTJConfig, scheme: Scheme, tensors: Mapping[str, TensorInfo]
    ) -> None:
        self._scheme = scheme
        self._blocks = [
            [(t, tensors[t.name(scheme)]) for t in block(config, i)] for i in range(config.n_layer)
        ]
        self._is_ready = all(
            info.dtype == "float32" and self._layout_op(tensor, info) is Op.COPY
            for rows in self._blocks
            for tensor, info in rows
        )
        stored = max(sum(whole_pages(info.nbytes) for _, info in rows) for rows in self._blocks)
        count = 2 if self._is_ready else 1
        self._places = [_Place(memory) for memory in page_buffers(count, stored)]
        self._laid_out = None if self._is_ready else self._new()

    def read(self, source: TensorSource, i: int, *, over: bool = False) -> list[np.ndarray]:
        """Return the weights of block `i` as they are stored. If they are computed with as they
        are, they stay until the block after the next is read; else until the next is.

        Args:
            source: source of the weights.
            i: number of the block.
            over: whether the previous block is no longer in use, so that its buffer may be
                overwritten.

        Raises:
            FileFault: the source cannot be read.
        """
        wanted, rows = (source, i), self._blocks[i]
        free = self._places[-1 if over else 0]
        place = next((p for p in self._places if p.holds == wanted), free)
        self._places.remove(place)
        self._places.append(place)
        found = page_arrays(place.memory, [_stored(info) for _, info in rows])
        if place.holds != wanted:
            place.holds = None
            for (tensor, _), values in zip(rows, found, strict=True):
                source.read_into(tensor.name(self._scheme), 0, raw_bytes(values))
            place.holds = wanted
        return found

    def lay_out(self, i: int, stored: Sequence[np.ndarray], *, own: bool) -> list[np.ndarray]:
        """Return the result of `read` for block `i` in float32 and Keras' layout.

        Args:
            i: number of the block.
            stored: weights from `read`; weights that need no conversion are returned as they are,
                unless `own` is set.
            own: whether the block gets memory of its own; else it overwrites the block before.
        """
        if self._is_ready and not own:
            return list(stored)
        memory = self._new() if own or self._laid_out is None else self._laid_out
        rows = self._blocks[i]
        found = page_arrays(memory, [_computed(t) for t, _ in rows])
        for row, values, out in zip(rows, stored, found, strict=True):
            if self._layout_op(*row) is Op.TRANSPOSE:
                transpose(out, values)
            else:
                np.copyto(out, values, casting="unsafe")
        return found

    def between_blocks(self, size: int) -> np.ndarray:
        """Return a scratch buffer of `size` bytes; it reuses the buffer of the computed form while
        no block is in it, if that is large enough."""
        if self._laid_out is not None and size <= self._laid_out.size:
            return self._laid_out[:size]
        return page_buffers(1, size)[0]

    def _layout_op(self, tensor: Tensor, info: TensorInfo) -> Op:
        """Return the op from the array in the file to Keras' layout."""
        return info.storage_op.then(tensor.op(self._scheme, Scheme.KERAS))

    def _new(self) -> np.ndarray:
        """Return memory for one block in float32."""
        size = sum(whole_pages(_computed(t).nbytes) for t, _ in self._blocks[0])
        return page_buffers(1, size)[0]


def _computed(tensor: Tensor) -> TensorInfo:
    return TensorInfo("float32", tensor.shape_in(Scheme.KERAS))


def _stored(info: TensorInfo) -> TensorInfo:
    """Return shape and dtype of the array in the file."""
    return TensorInfo(info.dtype, info.storage_shape)
