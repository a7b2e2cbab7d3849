"""The gradient of the embedding, of which a step changes only few rows.

Shape suffixes: N tokens, U distinct tokens, D hidden.
"""

from __future__ import annotations

import numpy as np


class EmbeddingGradient:
    """Gradient of the embedding, from the gradients of the rows that were looked up.

    Args:
        ids_N: token ids.
        d_ND: gradient of each token's row, float32.
    """

    def __init__(self, ids_N: np.ndarray, d_ND: np.ndarray) -> None:
        self._unique_U, where_N = np.unique(ids_N, return_inverse=True)
        self._sums_UD = np.zeros((len(self._unique_U), d_ND.shape[1]), np.float32)
        np.add.at(self._sums_UD, where_N.reshape(-1), d_ND)

    def fill(self, start: int, values: np.ndarray) -> None:
        """Fill a flat array with consecutive elements of the whole gradient, from `start` on."""
        values[:] = 0
        width = self._sums_UD.shape[1]
        stop = start + values.size
        first, last = np.searchsorted(self._unique_U, (start // width, -(-stop // width)))
        for token, row in zip(self._unique_U[first:last], self._sums_UD[first:last], strict=True):
            begin = int(token) * width
            inside = slice(max(begin, start) - begin, min(begin + width, stop) - begin)
            values[begin + inside.start - start : begin + inside.stop - start] = row[inside]
