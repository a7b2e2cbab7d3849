"""Random numbers of `numpy.random.default_rng`, in TensorFlow's operations.

A program that samples in TensorFlow can thereby draw what this project draws in numpy. The
generator is PCG64 (XSL-RR, 128 bits of state), seeded through `SeedSequence`; numpy guarantees
both streams, not that `default_rng` stays with them.

Shape suffix: B generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from gptj_model.network.array_type import Tensor

_WORD = 0xFFFFFFFF
#: Words of a seed sequence's pool, and its constants.
_POOL = 4
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = 0xCA01F9DD, 0x4973F715
#: Multiplier of the generator, high and low half.
_MULTIPLIER = (0x2360ED051FC65DA4, 0x4385DF649FCCF645)


class Wide(NamedTuple):
    """Numbers of 128 bits."""

    high_B: Tensor
    """High halves, uint64."""
    low_B: Tensor
    """Low halves, uint64."""


class Generators(NamedTuple):
    """State of several generators."""

    state: Wide
    increment: Wide


def default_rng(seeds_B: Tensor) -> Generators:
    """Return generators in the state of `numpy.random.default_rng(seed)`.

    Args:
        seeds_B: int64 seeds, none below 0.
    """
    seeds_B = tf.cast(seeds_B, tf.uint64)
    words = _state_words(_pool([_low(seeds_B), _high(seeds_B)]), 8)
    # numpy joins the words to numbers of 64 bits in the order of the machine: little-endian.
    a_B, b_B, c_B, d_B = (_joined(words[2 * n + 1], words[2 * n]) for n in range(4))
    sequence = Wide(c_B, d_B)
    increment = Wide(
        _or(_left(sequence.high_B, 1), _right(sequence.low_B, 63)),
        _or(_left(sequence.low_B, 1), _u64(1)),
    )
    # From the state 0 a step gives the increment.
    return Generators(_stepped(_sum(increment, Wide(a_B, b_B)), increment), increment)


def uniform(generators: Generators) -> tuple[Generators, Tensor]:
    """Return the generators after a draw, and the numbers that `Generator.random()` returns:
    float64 (B,), from 0 to 1 without 1."""
    state = _stepped(generators.state, generators.increment)
    bits_B = _rotated(_xor(state.high_B, state.low_B), _right(state.high_B, 58))
    drawn_B = tf.cast(_right(bits_B, 11), tf.float64) * 2.0**-53
    return Generators(state, generators.increment), drawn_B


def _pool(entropy: list[Tensor]) -> list[Tensor]:
    """Return the mixed pool of a seed sequence, of words as uint64. A missing word counts as 0."""
    hashed = _hash(_INIT_A, _MULT_A)
    words = [*entropy, *[tf.zeros_like(entropy[0]) for _ in range(_POOL - len(entropy))]]
    pool = [hashed(word) for word in words]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mixed(pool[target], hashed(pool[source]))
    return pool


def _state_words(pool: list[Tensor], count: int) -> list[Tensor]:
    hashed = _hash(_INIT_B, _MULT_B)
    return [hashed(pool[n % _POOL]) for n in range(count)]


def _hash(constant: int, multiplier: int) -> Callable[[Tensor], Tensor]:
    """Return a hash of words that changes with every call, as in numpy."""

    def hashed(word_B: Tensor) -> Tensor:
        nonlocal constant
        word_B = _xor(word_B, _u64(constant))
        constant = constant * multiplier & _WORD
        word_B = _low(word_B * _u64(constant))
        return _xor(word_B, _right(word_B, 16))

    return hashed


def _mixed(x_B: Tensor, y_B: Tensor) -> Tensor:
    word_B = _low(_u64(_MIX_LEFT) * x_B - _u64(_MIX_RIGHT) * y_B)
    return _xor(word_B, _right(word_B, 16))


def _stepped(state: Wide, increment: Wide) -> Wide:
    """Return state x multiplier + increment."""
    high, low = map(_u64, _MULTIPLIER)
    carried_B, low_B = _product(state.low_B, low)
    high_B = carried_B + state.high_B * low + state.low_B * high
    return _sum(Wide(high_B, low_B), increment)


def _product(x_B: Tensor, y: Tensor) -> Wide:
    """Return the 128 bits of a product of 64 by 64."""
    x_high_B, x_low_B, y_high, y_low = _high(x_B), _low(x_B), _high(y), _low(y)
    low_B = x_low_B * y_low
    middle_B = x_high_B * y_low + _high(low_B)
    other_B = x_low_B * y_high + _low(middle_B)
    high_B = x_high_B * y_high + _high(middle_B) + _high(other_B)
    return Wide(high_B, x_B * y)


def _sum(x: Wide, y: Wide) -> Wide:
    low_B = x.low_B + y.low_B
    carry_B = tf.cast(low_B < y.low_B, tf.uint64)
    return Wide(x.high_B + y.high_B + carry_B, low_B)


def _rotated(x_B: Tensor, count_B: Tensor) -> Tensor:
    """Return words of 64 bits, rotated right."""
    back_B = (_u64(64) - count_B) % _u64(64)
    right_B = tf.bitwise.right_shift(x_B, count_B)
    return _or(right_B, tf.bitwise.left_shift(x_B, back_B))


def _joined(high_B: Tensor, low_B: Tensor) -> Tensor:
    return _or(_left(high_B, 32), low_B)


def _u64(value: int) -> Tensor:
    return tf.constant(value, tf.uint64)


def _high(x_B: Tensor) -> Tensor:
    return _right(x_B, 32)


def _low(x_B: Tensor) -> Tensor:
    return tf.bitwise.bitwise_and(x_B, _u64(_WORD))


def _right(x_B: Tensor, count: int) -> Tensor:
    return tf.bitwise.right_shift(x_B, _u64(count))


def _left(x_B: Tensor, count: int) -> Tensor:
    return tf.bitwise.left_shift(x_B, _u64(count))


def _or(x_B: Tensor, y_B: Tensor) -> Tensor:
    return tf.bitwise.bitwise_or(x_B, y_B)


def _xor(x_B: Tensor, y_B: Tensor) -> Tensor:
    return tf.bitwise.bitwise_xor(x_B, y_B)
