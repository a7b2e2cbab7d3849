"""A `TensorSource` of arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gptj_model.source import TensorInfo


class MemorySource:
    """Arrays by name, as if they lay in a file in this order."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.tensors = {n: TensorInfo(a.dtype.name, a.shape) for n, a in arrays.items()}
        self._raw = {name: array.tobytes() for name, array in arrays.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._raw[name][offset : offset + len(buffer)]

    def close(self) -> None:
        pass
