"""Figures of two models' outputs against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr

from golden.compare import (
    compare_logits,
    over_spread,
    relative_by_token,
    relative_difference,
)


def _logits(tokens: int, vocabulary: int, seed: int) -> np.ndarray:
    # Far from 0, so that a mean that is left out of the spread shows.
    return np.random.default_rng(seed).normal(3, 2, (tokens, vocabulary)).astype(np.float32)


@given(st.sampled_from([1, 63, 64, 65, 200]), st.sampled_from([5, 10, 12, 40]), st.integers(0, 99))
def test_figures_are_their_definitions(tokens: int, vocabulary: int, seed: int):
    expected = _logits(tokens, vocabulary, seed)
    found = expected + 0.2 * _logits(tokens, vocabulary, seed + 1)
    figures = compare_logits(found, expected)
    x, y = found.astype(np.float64), expected.astype(np.float64)
    deltas = np.abs(x - y).max(1)
    assert np.array_equal(figures.max_abs_N, deltas)
    assert figures.max_abs == deltas.max()
    assert figures.worst_token == deltas.argmax()
    p, q = np.exp(log_softmax(y, axis=1)), np.exp(log_softmax(x, axis=1))
    kl = rel_entr(p, q).sum(1)
    np.testing.assert_allclose(figures.kl_N, kl, rtol=1e-9, atol=1e-12)
    assert figures.max_kl == figures.kl_N.max()
    same = x.argmax(1) == y.argmax(1)
    assert np.array_equal(figures.same_first_N, same)
    assert figures.same_first_N.dtype == bool
    assert figures.top1 == same.mean()
    top = min(10, vocabulary)
    tops = [np.argsort(a, axis=1)[:, -top:] for a in (x, y)]
    shared = [len(set(a) & set(b)) / top for a, b in zip(*tops, strict=True)]
    np.testing.assert_allclose(figures.shared_top_N, shared)
    assert figures.top10 == pytest.approx(np.mean(shared))
    assert figures.spread == pytest.approx(y.std(), rel=1e-9)
    assert figures.relative == figures.max_abs / figures.spread


def test_rounding_gives_no_negative_kl():
    logits = _logits(9, 40, 1)
    figures = compare_logits(logits, logits)
    assert (figures.max_abs, figures.max_kl, figures.top1, figures.top10) == (0, 0, 1, 1)


@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_passes_no_tolerance(side: int):
    sides = [_logits(70, 12, 1), _logits(70, 12, 1)]
    sides[side][66, 3] = np.nan
    figures = compare_logits(*sides)
    assert math.isnan(figures.max_abs)
    assert math.isnan(figures.relative)
    assert math.isnan(figures.max_kl)
    assert np.isnan(figures.max_abs_N).sum() == 1


def test_constant_logits_have_no_spread():
    figures = compare_logits(np.full((3, 12), 0.1), np.full((3, 12), 0.1))
    assert (figures.spread, figures.relative) == (pytest.approx(0, abs=1e-8), 0)


@pytest.mark.parametrize(
    ("delta", "spread", "expected"),
    [
        (1.0, 4.0, 0.25),
        (1.0, 0.5, 2.0),
        (0.0, 0.0, 0.0),
        (1e-9, 0.0, math.inf),
        (math.nan, 0.0, math.nan),
        (math.nan, 2.0, math.nan),
        (1.0, math.nan, math.nan),
        (0.0, math.nan, math.nan),
    ],
)
def test_without_spread_only_equality_will_do(delta: float, spread: float, expected: float):
    found = over_spread(delta, spread)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


def test_hidden_states_are_judged_token_by_token():
    expected = np.array([[1.0, -1.0], [3.0, -3.0]], np.float32)
    found = expected + np.array([[0.0, 0.5], [-0.25, 0.0]], np.float32)
    spread = expected.std(dtype=np.float64)
    np.testing.assert_allclose(relative_by_token(found, expected), [0.5 / spread, 0.25 / spread])
    assert relative_difference(found, expected) == pytest.approx(0.5 / spread)
    constant = np.ones((2, 3), np.float32)
    other = constant.copy()
    other[1, 2] = 2
    assert relative_by_token(other, constant).tolist() == [0, math.inf]
    assert relative_difference(constant, constant) == 0


def test_half_precision_does_not_overflow_the_spread():
    expected = np.array([[60000.0, -60000.0]], np.float16)
    assert relative_by_token(expected, expected).tolist() == [0]
    assert relative_difference(expected, expected) == 0


def test_large_logits_do_not_overflow():
    expected = np.array([[1000.0, 999.0, 0.0]])
    figures = compare_logits(expected + 0.5, expected)
    assert figures.max_kl == pytest.approx(0, abs=1e-12)
    assert figures.spread == pytest.approx(expected.std())
