"""The two ways in which a tensor moves from one layout to another."""

from __future__ import annotations

from enum import Enum

import numpy as np


class Op(Enum):
    """How a tensor's values move between two layouts: as they are, or with their axes reversed."""

    COPY = "copy"
    TRANSPOSE = "transpose"

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return the values in the other layout: a view of the same dtype.

        Both ops are their own inverse.
        """
        return values.T if self is Op.TRANSPOSE else values

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that `__call__` gives to values of this shape."""
        return shape[::-1] if self is Op.TRANSPOSE else shape

    def then(self, other: Op) -> Op:
        """Return the one op that equals this op followed by `other`."""
        return Op.COPY if self is other else Op.TRANSPOSE
