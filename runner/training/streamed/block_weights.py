"""Source of the weights of a streamed step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from gptj_model.streaming.training import ReadHead
from gptj_model.tensors import Tensor


class BlockWeights(Protocol):
    """Weights that are read when they are needed, in Keras' layout."""

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows start:stop (or to the end) of the embedding, or a vector, in float32."""
        ...

    def head(self) -> ReadHead:
        """Return a function that reads parts of the head; it may hold the whole head while it
        lives."""
        ...

    def blocks(
        self, order: Iterable[int], load: Callable[[Sequence[np.ndarray]], None]
    ) -> Iterator[int]:
        """Yield numbers of blocks whose weights are loaded, while the next one is read.

        Args:
            order: numbers of the blocks.
            load: takes the weights of one block, and does not keep the arrays.
        """
        ...

    def of_block(self, i: int) -> Sequence[Tensor]:
        """Return the rows that the gradients of a block belong to."""
        ...
