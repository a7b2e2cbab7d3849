"""Tensors of one checkpoint, prefetched strip by strip.

One thread reads the strips, and another one computes their checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptj_convert.streams.pipeline import BufferPool, Pipeline
from gptj_convert.streams.strips import SMALL_STRIP_BYTES, Strip, Strips, strip_buffers, strip_bytes
from gptj_model.op import Op
from gptj_model.source import TensorSource

#: Most strips and ends of tensors in a queue; the memory of large strips is the tighter bound.
_ITEMS = 64


_Item = tuple[Strips, Strip | None, np.ndarray | None]
"""A tensor, and one of its strips with its buffer. A small strip has no buffer; None as the strip
marks the end of the tensor."""


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """Request to read one tensor; the fields are those of `Strips`."""

    name: str
    op: Op
    observe: Callable[[np.ndarray], None]
    """Function that a reading thread calls with every part of the tensor."""


class TensorPrefetch:
    """Tensors read in order, up to `count` strips before they are used.

    Args:
        source: checkpoint that holds the tensors.
        requests: tensors to read, in order.
        pipeline: owner of the threads, which ends them.
        count: number of strip buffers; None computes it with `strip_buffers`.

    Attributes:
        crc: crc32c of the tensor whose strips were taken last, as the source has it.
    """

    def __init__(
        self,
        source: TensorSource,
        requests: Sequence[TensorRequest],
        pipeline: Pipeline,
        count: int | None,
    ) -> None:
        size = max((strip_bytes(source.tensors[r.name], r.op) for r in requests), default=0)
        self._buffers = BufferPool(pipeline, count or strip_buffers(size), size)
        read = pipeline.prefetch(self._read(source, requests), depth=_ITEMS)
        self._ahead = pipeline.prefetch(_with_checksums(read), depth=_ITEMS)
        self.crc = 0

    def strips(self) -> Iterator[Strip]:
        """Yield the strips of the next tensor; each is valid until the next one is requested."""
        for item in self._ahead:
            if isinstance(item, int):
                self.crc = item
                return
            strip, memory = item
            yield strip
            if memory is not None:
                self._buffers.give(memory)

    def _read(self, source: TensorSource, requests: Sequence[TensorRequest]) -> Iterator[_Item]:
        """Yield the strips of each tensor, the large ones with their buffers, and then its end."""
        memory: np.ndarray | None = None

        def take(size: int) -> np.ndarray:
            nonlocal memory
            if size <= SMALL_STRIP_BYTES:
                memory = None
                return np.empty(size, np.uint8)
            memory = self._buffers.take()
            return memory

        for tensor in requests:
            strips = Strips(
                source, tensor.name, tensor.op, buffer=take, observe=tensor.observe, deferred=True
            )
            for strip in strips:
                yield strips, strip, memory
            yield strips, None, None


def _with_checksums(items: Iterable[_Item]) -> Iterator[tuple[Strip, np.ndarray | None] | int]:
    """Compute the checksums of strips that were read, and replace each end by a tensor's crc32c.

    Runs while the next strips are read.
    """
    for strips, strip, memory in items:
        if strip is None:
            yield strips.crc
            continue
        if strips.are_contiguous:
            strips.record(strip.values)
        yield strip, memory
