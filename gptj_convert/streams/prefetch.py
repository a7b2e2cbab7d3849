"""Tensors of one checkpoint, read strip by strip and counted, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptj_convert.streams.pipeline import BufferPool, Pipeline
from gptj_convert.streams.strips import SMALL_STRIP_BYTES, Strip, Strips, strip_buffers, strip_bytes
from gptj_model.op import Op
from gptj_model.source import TensorSource

#: Strips and ends of tensors that wait to be taken; the memory of large strips sets the bound.
_ITEMS = 64


_Item = tuple[Strips, Strip | None, np.ndarray | None]
"""A tensor, one of its strips with its memory, unless that is small; None: its end."""


@dataclass(frozen=True, slots=True)
class TensorRequest:
    """One tensor to read; see `Strips`."""

    name: str
    op: Op
    look: Callable[[np.ndarray], None]
    """Runs in a thread of the reading."""


class TensorPrefetch:
    """Tensors read in order, up to `count` strips before they are taken.

    Args:
        source: of the tensors.
        wanted: which, in order.
        pipeline: gives the thread, and ends it.
        count: of large strips that go around; None: `strip_buffers`.

    Attributes:
        crc: of the tensor whose strips were taken last, as the source has it: crc32c.
    """

    def __init__(
        self,
        source: TensorSource,
        wanted: Sequence[TensorRequest],
        pipeline: Pipeline,
        count: int | None,
    ) -> None:
        size = max((strip_bytes(source.tensors[w.name], w.op) for w in wanted), default=0)
        self._buffers = BufferPool(pipeline, count or strip_buffers(size), size)
        read = pipeline.prefetch(self._read(source, wanted), depth=_ITEMS)
        self._ahead = pipeline.prefetch(_counted(read), depth=_ITEMS)
        self.crc = 0

    def strips(self) -> Iterator[Strip]:
        """Those of the next tensor; each holds until the next is asked for."""
        for item in self._ahead:
            if isinstance(item, int):
                self.crc = item
                return
            strip, memory = item
            yield strip
            if memory is not None:
                self._buffers.give(memory)

    def _read(self, source: TensorSource, wanted: Sequence[TensorRequest]) -> Iterator[_Item]:
        """Strips, the large ones with their memory; after those of a tensor its end."""
        memory: np.ndarray | None = None

        def take(size: int) -> np.ndarray:
            nonlocal memory
            if size <= SMALL_STRIP_BYTES:
                memory = None
                return np.empty(size, np.uint8)
            memory = self._buffers.take()
            return memory

        for tensor in wanted:
            strips = Strips(
                source, tensor.name, tensor.op, buffer=take, look=tensor.look, deferred=True
            )
            for strip in strips:
                yield strips, strip, memory
            yield strips, None, None


def _counted(items: Iterable[_Item]) -> Iterator[tuple[Strip, np.ndarray | None] | int]:
    """Strips that were read are counted while the next ones are read; ends become crc32cs."""
    for strips, strip, memory in items:
        if strip is None:
            yield strips.crc
            continue
        if strips.are_parts:
            strips.count(strip.values)
        yield strip, memory
