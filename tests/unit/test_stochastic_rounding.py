"""bfloat16 that keeps, in the mean, what float32 had."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.training.update.stochastic_rounding import random_bits, round_into, widened

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
KEY = (-3, 4096)

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
bits16 = st.integers(0, 2**16 - 1)


def _rounded(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    narrow = np.empty(values.shape, BFLOAT16)
    round_into(narrow, values, bits)
    return widened(narrow)


@given(float32s, bits16)
def test_a_value_becomes_one_of_its_two_neighbours(value: float, bits: int):
    values = np.full(1, value, np.float32)
    (found,) = _rounded(values, np.full(1, bits, np.uint16))
    below = (values.view(np.uint32) >> 16 << 16).view(np.float32)[0]
    above = ((values.view(np.uint32) >> 16) + 1 << 16).view(np.float32)[0]
    assert found == below or (found == above and value != below)
    assert np.signbit(found) == np.signbit(values[0])


@given(bits16, bits16)
def test_what_bfloat16_has_stays_as_it_is(pattern: int, bits: int):
    (exact,) = widened(np.full(1, pattern, np.uint16).view(BFLOAT16))
    assert exact == np.full(1, pattern, np.uint16).view(BFLOAT16)[0] or np.isnan(exact)
    if np.isfinite(exact):
        assert _rounded(np.full(1, exact), np.full(1, bits, np.uint16))[0] == exact


@pytest.mark.parametrize("value", [1.001, -3e-5, 1e-38, 7.7e30])
def test_the_mean_is_the_value(value: float):
    count = 2**18
    values = np.full(count, value, np.float32)
    found = _rounded(values, random_bits(KEY, (0, 1), 0, count)).astype(np.float64)
    step = found.max() - found.min()
    # Five standard deviations of a mean of `count` values, each at most half a step.
    assert found.mean() == pytest.approx(float(values[0]), abs=2.5 * step / count**0.5)
    assert step > 0


def test_a_mean_square_that_hardly_moves_goes_where_it_should():
    count, decay = 2**12, 1e-3
    narrow = np.full(count, 1, BFLOAT16)
    nearest, exact = narrow.copy(), 1.0
    for step in range(1000):
        exact += (0.25 - exact) * decay
        new = widened(narrow) + (np.float32(0.25) - widened(narrow)) * np.float32(decay)
        round_into(narrow, new, random_bits((1, step), (0, 0), 0, count))
        old = nearest.astype(np.float32)
        nearest = (old + (np.float32(0.25) - old) * np.float32(decay)).astype(BFLOAT16)
    assert (nearest == 1).all()
    assert widened(narrow).mean() == pytest.approx(exact, rel=2e-3)


def test_bits_do_not_depend_on_what_is_asked_for_at_once():
    whole = random_bits(KEY, (1, 2), 32, 1000)
    np.testing.assert_array_equal(whole[:201], random_bits(KEY, (1, 2), 32, 201))
    np.testing.assert_array_equal(whole[160:], random_bits(KEY, (1, 2), 192, 840))
    for key, of in (((-3, 4097), (1, 2)), ((3, 4096), (1, 2)), (KEY, (0, 2)), (KEY, (1, 3))):
        assert not np.array_equal(whole, random_bits(key, of, 32, 1000))
