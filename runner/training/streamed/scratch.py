"""Arrays that a step keeps on disk until it is done."""

from __future__ import annotations

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.files.output_file import OutputFile
from gptj_convert.files.ranged_file import ALIGNMENT, RangedFile
from gptj_convert.files.whole_file import PARTIAL
from gptj_model.source import raw_bytes


class Scratch:
    """Arrays by key in an unnamed file, of which nothing remains however the process ends.

    An array may be replaced by another of the same kind.

    Args:
        folder: folder whose disk is used.
        sizes: bytes of each array that will be kept; their space is allocated at once.

    Raises:
        FileFault: the disk is full or not writable.
    """

    def __init__(self, folder: Path, sizes: list[int]) -> None:
        path = folder / f"{PARTIAL}scratch"
        path.unlink(missing_ok=True)
        self._size = sum(map(_whole_pages, sizes))
        self._output = OutputFile(path, self._size)
        self._input = RangedFile(path)
        path.unlink()
        self._places: dict[Hashable, tuple[int, tuple[int, ...], Any]] = {}
        self._end = 0

    def put(self, key: Hashable, values: np.ndarray) -> None:
        """Keep an array.

        Raises:
            FileFault: the disk is not writable.
        """
        if key not in self._places:
            self._places[key] = self._end, values.shape, values.dtype
            self._end += _whole_pages(values.nbytes)
            assert self._end <= self._size, "as much as was planned"
        begin, shape, dtype = self._places[key]
        assert (values.shape, values.dtype) == (shape, dtype), "one key, one kind of array"
        self._output.write(begin, raw_bytes(np.ascontiguousarray(values)))

    def get(self, key: Hashable) -> np.ndarray:
        """Return an array that was kept.

        Raises:
            FileFault: the disk is not readable.
        """
        _, shape, dtype = self._places[key]
        values = np.empty(shape, dtype)
        self.fill(key, 0, values.reshape(-1))
        return values

    def fill(self, key: Hashable, start: int, values: np.ndarray) -> None:
        """Fill a flat array with consecutive elements of a kept one, from `start` on.

        Raises:
            FileFault: the disk is not readable.
        """
        begin, shape, dtype = self._places[key]
        assert start + values.size <= math.prod(shape)
        self._input.read_into(begin + start * dtype.itemsize, raw_bytes(values), str(key))

    def close(self) -> None:
        """Free the disk space."""
        self._output.close()
        self._input.close()


def _whole_pages(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
