"""The memory that blocks are read into, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptj_convert.formats.ranged_file import ALIGNMENT
from gptj_convert.pipeline import page_memory
from gptj_model.config import GPTJConfig
from gptj_model.source import TensorSource, raw_bytes
from gptj_model.tensors import Scheme, Tensor, block


@dataclass(eq=False, slots=True)
class _Place:
    """Memory of one block."""

    values: list[np.ndarray]
    """Of its tensors."""
    holds: tuple[TensorSource, int] | None = None
    """Whose values they are: source and number of the block."""


class BlockMemory:
    """Float32 weights of two blocks: one computes, the next one is read in the place of the one
    before. The two that were read last stay, for a pass in the other direction.

    The system is asked for memory only once, and gives a page at the first use; what begins with
    a page is read from the disk without a copy.

    Args:
        config: of the model.

    Raises:
        MemoryFault: the system does not give it.
    """

    def __init__(self, config: GPTJConfig) -> None:
        self._config = config
        rows = block(config, 0)
        size = sum(_whole_pages(4 * t.size) for t in rows)
        self._places = [_Place(_laid_out(memory, rows)) for memory in page_memory(2, size)]

    def read(self, source: TensorSource, i: int) -> list[np.ndarray]:
        """The weights of block `i`, in TF's layout; they stay until the one after the next is
        read.

        Raises:
            FileFault: the source cannot be read.
        """
        wanted = (source, i)
        place = next((p for p in self._places if p.holds == wanted), self._places[0])
        self._places.remove(place)
        self._places.append(place)
        if place.holds != wanted:
            place.holds = None
            for tensor, values in zip(block(self._config, i), place.values, strict=True):
                source.read_into(tensor.tf, 0, raw_bytes(values))
            place.holds = wanted
        return place.values


def _laid_out(memory: np.ndarray, rows: Sequence[Tensor]) -> list[np.ndarray]:
    """Arrays for these tensors, each beginning with a page."""
    found, begin = [], 0
    for tensor in rows:
        part = memory[begin : begin + 4 * tensor.size]
        found.append(part.view(np.float32).reshape(tensor.shape_in(Scheme.TF)))
        begin += _whole_pages(4 * tensor.size)
    return found


def _whole_pages(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
