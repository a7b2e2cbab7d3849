"""Float32 in bfloat16, rounded up or down at random, so that the mean is what was rounded.

A mean square with beta2 0.999 changes by a thousandth a step, and bfloat16's steps are up to a
128th: rounded to the nearest, it would stay where it is for ever.
"""

from __future__ import annotations

import numpy as np

#: Elements that one count of the generator is for: four times 64 bits, of which each takes 16.
_A_COUNT = 16


def widened(narrow: np.ndarray) -> np.ndarray:
    """Bfloat16 as float32, which is exact."""
    return (narrow.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def round_into(narrow: np.ndarray, values: np.ndarray, bits: np.ndarray) -> None:
    """Fill a bfloat16 array with the finite float32 values.

    Args:
        narrow: is filled.
        values: of the same number.
        bits: uint16, uniformly random, of the same number: a value is rounded away from zero where
            they and the lower half of it carry.
    """
    narrow.view(np.uint16)[:] = (values.view(np.uint32) + bits) >> 16


def random_bits(key: tuple[int, int], of: tuple[int, int], start: int, size: int) -> np.ndarray:
    """Uniformly random uint16, a function of the arguments alone: those from `start` on of the
    sequence that belongs to key and `of`, whatever is asked for at once. By Philox (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        key: two numbers; of negative ones 64 bits count.
        of: two numbers that are not negative.
        start: a multiple of 16.
        size: how many.
    """
    assert start % _A_COUNT == 0
    low = np.array([number % 2**64 for number in key], np.uint64)
    generator = np.random.Philox(key=low, counter=[start // _A_COUNT, *of, 0])
    return generator.random_raw(-(-size // 4)).view(np.uint16)[:size]
