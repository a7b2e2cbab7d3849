"""Where a streamed step takes its weights from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from gptj_model.streaming.training import ReadHead
from gptj_model.tensors import Tensor


class BlockWeights(Protocol):
    """Weights that are read when they are needed, in Keras' layout."""

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop (None: to the end) of the embedding, or a vector, in float32."""
        ...

    def head(self) -> ReadHead:
        """What gives the parts of the head; it may hold all of it as long as it is there."""
        ...

    def blocks(
        self, order: Iterable[int], load: Callable[[Sequence[np.ndarray]], None]
    ) -> Iterator[int]:
        """Numbers of blocks whose weights were loaded; the next one's are read meanwhile.

        Args:
            order: of the blocks.
            load: takes the weights of one, and does not keep the arrays.
        """
        ...

    def of_block(self, i: int) -> Sequence[Tensor]:
        """Rows of what the gradients of a block are of."""
        ...
