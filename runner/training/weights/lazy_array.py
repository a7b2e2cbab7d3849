"""Arrays that are computed each time they are read, and not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class LazyArray:
    """An array for numpy whose shape and dtype are known, and whose values are computed when they
    are read.

    Args:
        shape: shape of the values.
        make: returns the values.
        dtype: dtype of the values.
    """

    def __init__(
        self, shape: tuple[int, ...], make: Callable[[], np.ndarray], *, dtype: Any = "float32"
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self._make = make

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._make(), dtype)
