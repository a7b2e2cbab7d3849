"""Tensors of one checkpoint, read strip by strip in a thread of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptj_convert.panels import Strip, Strips, strip_bytes
from gptj_convert.pipeline import Buffers, Pipeline
from gptj_model.op import Op
from gptj_model.source import TensorSource


@dataclass(frozen=True, slots=True)
class Wanted:
    """One tensor to read; see `Strips`."""

    name: str
    op: Op
    look: Callable[[np.ndarray], None]
    """Runs in the reading thread."""


class ReadAhead:
    """Tensors read in order, up to `count` strips before they are taken.

    Args:
        source: of the tensors.
        wanted: which, in order.
        pipeline: gives the thread, and ends it.
        count: of strips that go around.

    Attributes:
        crc: of the tensor whose strips were taken last, as the source has it: crc32c.
    """

    def __init__(
        self, source: TensorSource, wanted: Sequence[Wanted], pipeline: Pipeline, count: int
    ) -> None:
        size = max((strip_bytes(source.tensors[w.name], w.op) for w in wanted), default=0)
        self._buffers = Buffers(pipeline, count, size)
        self._ahead = pipeline.ahead(self._read(source, wanted), depth=count - 1)
        self.crc = 0

    def strips(self) -> Iterator[Strip]:
        """Those of the next tensor; each holds until the next is asked for."""
        for item in self._ahead:
            if isinstance(item, int):
                self.crc = item
                return
            strip, memory = item
            yield strip
            self._buffers.give(memory)

    def _read(
        self, source: TensorSource, wanted: Sequence[Wanted]
    ) -> Iterator[tuple[Strip, np.ndarray] | int]:
        """Strips with their memory; after those of a tensor its crc32c."""
        memory = np.empty(0, np.uint8)

        def take(size: int) -> np.ndarray:
            nonlocal memory
            memory = self._buffers.take()
            return memory

        for tensor in wanted:
            strips = Strips(source, tensor.name, tensor.op, buffer=take, look=tensor.look)
            for strip in strips:
                yield strip, memory
            yield strips.crc
