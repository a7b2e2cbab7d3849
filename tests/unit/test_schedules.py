"""Schedules against Keras' own, and the rules for several in a row."""

from __future__ import annotations

import keras
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runner.config import params as p
from runner.training.update.schedules import learning_rate

K = keras.optimizers.schedules
steps = st.integers(0, 60)


def _same(schedule, expected, t: int) -> None:
    # One unit in the last place of the initial rate: what float32 leaves of 1 + cos at its end.
    assert learning_rate([schedule])(t) == pytest.approx(float(expected(t)), rel=2e-6, abs=2.4e-8)


@settings(deadline=None)
@given(steps, st.booleans())
@example(30, True)
def test_linear(t: int, cycle: bool):
    ours = p.Linear(
        scheduler="Linear",
        initial_learning_rate=0.2,
        end_learning_rate=0.01,
        steps=25,
        cycle=cycle,
    )
    _same(ours, K.PolynomialDecay(0.2, 25, 0.01, power=1.0, cycle=cycle), t)


@given(steps, st.booleans(), st.sampled_from([0.5, 1.0, 2.0]))
def test_polynomial(t: int, cycle: bool, power: float):
    ours = p.Polynomial(
        scheduler="Polynomial",
        initial_learning_rate=0.2,
        end_learning_rate=0.01,
        steps=25,
        power=power,
        cycle=cycle,
    )
    _same(ours, K.PolynomialDecay(0.2, 25, 0.01, power=power, cycle=cycle), t)


@given(steps, st.sampled_from([0.0, 0.1]))
def test_cosine(t: int, alpha: float):
    ours = p.Cosine(scheduler="Cosine", initial_learning_rate=0.2, decay_steps=25, alpha=alpha)
    _same(ours, K.CosineDecay(0.2, 25, alpha), t)


@given(steps, st.booleans())
def test_exponential(t: int, staircase: bool):
    ours = p.Exponential(
        scheduler="Exponential",
        initial_learning_rate=0.2,
        decay_steps=7,
        decay_rate=0.8,
        staircase=staircase,
    )
    _same(ours, K.ExponentialDecay(0.2, 7, 0.8, staircase), t)


@settings(deadline=None)
@given(steps)
@example(5)
@example(20)
@example(21)
def test_piecewise_constant(t: int):
    ours = p.PiecewiseConstant(
        scheduler="PiecewiseConstant", boundaries=[5, 20], values=[0.3, 0.2, 0.1]
    )
    _same(ours, K.PiecewiseConstantDecay([5, 20], [0.3, 0.2, 0.1]), t)


def _warm_up_then(last) -> list:
    warm_up = p.Linear(
        scheduler="Linear", initial_learning_rate=0.0, end_learning_rate=1.0, steps=4
    )
    return [warm_up, last]


def test_a_member_starts_from_its_own_step_0():
    cosine = p.Cosine(scheduler="Cosine", initial_learning_rate=1.0, decay_steps=10)
    rate = learning_rate(_warm_up_then(cosine))
    assert [rate(t) for t in (0, 2, 4, 9, 14, 99)] == pytest.approx([0, 0.5, 1.0, 0.5, 0, 0])


def test_unless_it_does_not_reset():
    cosine = p.Cosine(
        scheduler="Cosine",
        initial_learning_rate=1.0,
        decay_steps=10,
        disable_lr_steps_reset=True,
    )
    rate = learning_rate(_warm_up_then(cosine))
    assert rate(5) == pytest.approx(0.5)


def test_the_last_member_has_no_end():
    constant = p.Constant(scheduler="Constant", learning_rate=0.25)
    rate = learning_rate(_warm_up_then(constant))
    assert [rate(t) for t in (3, 4, 10_000)] == [0.75, 0.25, 0.25]


def test_three_in_a_row_each_count_from_their_own_start():
    end = p.Constant(scheduler="Constant", learning_rate=0.5)
    fall = p.Linear(scheduler="Linear", initial_learning_rate=1.0, end_learning_rate=0.0, steps=10)
    rate = learning_rate([*_warm_up_then(fall), end])
    assert [rate(t) for t in (3, 4, 9, 13, 14)] == pytest.approx([0.75, 1.0, 0.5, 0.1, 0.5])
    rate = learning_rate([*_warm_up_then(fall), end], reset=False)
    assert [rate(t) for t in (3, 4, 9, 13, 14)] == pytest.approx([0.75, 0.6, 0.1, 0.0, 0.5])


@pytest.mark.parametrize(("stated", "length"), [(None, 10), (4, 4)])
def test_a_cosine_lasts_its_decay_unless_it_says_otherwise(stated: int | None, length: int):
    cosine = p.Cosine(scheduler="Cosine", initial_learning_rate=1.0, decay_steps=10, steps=stated)
    rate = learning_rate([cosine, p.Constant(scheduler="Constant", learning_rate=7.0)])
    assert rate(length - 1) < 1
    assert rate(length) == 7
