"""Blocks brought one after the other, the next one read while the present one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Weights = TypeVar("Weights")


def blocks_ahead(
    read: Callable[[int], Weights], order: Iterable[int], load: Callable[[Weights], None]
) -> Iterator[int]:
    """Yield the number of each block once its weights are loaded.

    Args:
        read: gives the weights of a block; called in a thread.
        order: of the blocks.
        load: takes the weights of one, and does not keep them longer than it must: those of the
            next are read as soon as it returns.
    """
    numbers = list(order)
    with ThreadPoolExecutor(1, "read") as reader:
        coming = [reader.submit(read, i) for i in numbers[:1]]
        for n, i in enumerate(numbers, start=1):
            load(coming.pop().result())
            coming += [reader.submit(read, j) for j in numbers[n : n + 1]]
            yield i
