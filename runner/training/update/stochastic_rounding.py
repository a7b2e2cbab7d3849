"""Float32 values rounded to bfloat16 stochastically, so that their mean is preserved.

With beta2 0.999 a mean square changes by a thousandth per step, and neighboring bfloat16 numbers
differ by up to a 128th: rounded to the nearest, it would never change.
"""

from __future__ import annotations

import numpy as np

#: Number of elements per count of the generator: it yields four times 64 bits, and each element
#: takes 16.
_A_COUNT = 16


def widened(narrow: np.ndarray) -> np.ndarray:
    """Return bfloat16 values as float32, which is exact."""
    return (narrow.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def round_into(narrow: np.ndarray, values: np.ndarray, bits: np.ndarray) -> None:
    """Fill a bfloat16 array with finite float32 values.

    Args:
        narrow: array to fill.
        values: array of the same size.
        bits: uniformly random uint16 array of the same size; a value is rounded away from zero
            where adding them to its lower half carries.
    """
    narrow.view(np.uint16)[:] = (values.view(np.uint32) + bits) >> 16


def random_bits(key: tuple[int, int], of: tuple[int, int], start: int, size: int) -> np.ndarray:
    """Return uniformly random uint16 numbers that are a function of the arguments alone: elements
    from `start` on of the sequence that belongs to `key` and `of`, by Philox (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        key: two numbers; of negative ones 64 bits count.
        of: two numbers that are not negative.
        start: index of the first number, a multiple of 16.
        size: number of elements.
    """
    assert start % _A_COUNT == 0
    low = np.array([number % 2**64 for number in key], np.uint64)
    generator = np.random.Philox(key=low, counter=[start // _A_COUNT, *of, 0])
    return generator.random_raw(-(-size // 4)).view(np.uint16)[:size]
