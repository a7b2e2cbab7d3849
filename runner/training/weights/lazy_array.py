"""An array that is made each time it is asked for, and not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class LazyArray:
    """What numpy takes for an array: its shape and dtype are known, its values are made late.

    Args:
        shape: of the values.
        make: the values.
        dtype: of the values.
    """

    def __init__(
        self, shape: tuple[int, ...], make: Callable[[], np.ndarray], *, dtype: Any = "float32"
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self._make = make

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._make(), dtype)
