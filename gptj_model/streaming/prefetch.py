"""Blocks loaded one after the other, while the next one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Weights = TypeVar("Weights")


def prefetch_blocks(
    read: Callable[[int], Weights], order: Iterable[int], load: Callable[[Weights], None]
) -> Iterator[int]:
    """Yield the number of each block once its weights are loaded.

    Args:
        read: returns the weights of a block; called in a thread.
        order: numbers of the blocks.
        load: takes the weights of one block; the next block is read as soon as it returns, so it
            must not hold them longer.
    """
    numbers = list(order)
    with ThreadPoolExecutor(1, "read") as reader:
        coming = [reader.submit(read, i) for i in numbers[:1]]
        for n, i in enumerate(numbers, start=1):
            load(coming.pop().result())
            coming += [reader.submit(read, j) for j in numbers[n : n + 1]]
            yield i
