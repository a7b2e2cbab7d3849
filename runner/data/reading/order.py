"""The order of records: files read in turns, and a shuffle through a buffer.

Both give the order of `tf.data.Dataset.interleave` and `tf.data.Dataset.shuffle` of TensorFlow
2.21 to the record, so that a run keeps its order on every backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import TypeVar

import numpy as np

T = TypeVar("T")

#: Global seed of TensorFlow when none is set, which tf.data mixes into the seed of every shuffle.
_GLOBAL_SEED = 87654321
#: TensorFlow takes seeds modulo this number.
_SEEDS = 2**31 - 1

#: Constants of Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], np.uint32)
_ROUNDS = 10
#: Number of counters whose random numbers are computed at once; each gives four.
_COUNTERS = 1024


def interleave(sources: Iterable[Iterator[T]], width: int) -> Iterator[T]:
    """Yield one item of each of `width` sources in turns; an exhausted source makes room for the
    next one."""
    waiting = iter(sources)
    open_: list[Iterator[T] | None] = [None] * width
    is_left = True  # whether a source may be waiting
    at = 0
    while is_left or any(source is not None for source in open_):
        source = open_[at]
        if source is None and is_left:
            source = open_[at] = next(waiting, None)
            is_left = source is not None
        if source is not None:
            try:
                yield next(source)
            except StopIteration:
                open_[at] = None
        at = (at + 1) % width


def shuffle(items: Iterable[T], buffer: int, seed: int) -> Iterator[T]:
    """Yield items in random order, each drawn from the next `buffer` items that are left.

    Args:
        items: items to shuffle.
        buffer: number of items held in memory.
        seed: seed, a whole number.
    """
    draws = _random(_GLOBAL_SEED, seed % _SEEDS)
    held: list[T] = []
    first = 0  # place of the oldest item; those before it are taken
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        # The oldest item moves to the place of the drawn one, and the new item to its own.
        at = (first + next(draws) % buffer) % buffer
        yield held[at]
        held[at] = held[first]
        held[first] = item
        first = (first + 1) % buffer
    held = held[first:] + held[:first]
    for taken in range(len(held)):
        at = taken + next(draws) % (len(held) - taken)
        yield held[at]
        held[at] = held[taken]


def _random(key: int, seed: int) -> Iterator[int]:
    """Yield the random numbers of TensorFlow's Philox generator, from 0 to 2**32 - 1."""
    for start in count(0, _COUNTERS):
        yield from _philox(key, seed, start).ravel().tolist()


def _philox(key: int, seed: int, start: int) -> np.ndarray:
    """Return the numbers of `_COUNTERS` successive counters, uint32 of shape (counters, 4)."""
    low = np.arange(start, start + _COUNTERS, dtype=np.uint64)
    words = np.empty((4, _COUNTERS), np.uint32)
    words[0], words[1] = low, low >> np.uint64(32)
    words[2:] = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], np.uint32)
    keys = np.array([key & 0xFFFFFFFF, key >> 32], np.uint32)
    for _ in range(_ROUNDS):
        products = words[::2] * _MULTIPLIERS[:, None]
        high, low = (products >> np.uint64(32)).astype(np.uint32), products.astype(np.uint32)
        words = np.stack(
            [high[1] ^ words[1] ^ keys[0], low[1], high[0] ^ words[3] ^ keys[1], low[0]]
        )
        keys = keys + _KEY_STEPS  # modulo 2**32
    return words.T
