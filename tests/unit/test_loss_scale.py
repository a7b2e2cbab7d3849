"""Loss scales against TensorFlow's own, and against the reference's rule written out."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.containers.tensor_bundle import BundleSource, write_bundle
from gptj_model.tensors import CURRENT_LOSS_SCALE, GOOD_STEPS
from runner.config.params import OptimizerParams
from runner.training.update.loss_scale import loss_scale
from tests.unit.memory_source import MemorySource

overflows = st.lists(st.sampled_from([True, True, True, False]), max_size=60)


def _params(kind: str | float, **options) -> OptimizerParams:
    return OptimizerParams(
        optimizer_type="sgd", learning_rate=1, loss_scaling_factor=kind, **options
    )


@settings(max_examples=25, deadline=None)
@given(overflows, st.integers(1, 7))
def test_tf_dynamic_is_tensorflows(finite: list[bool], period: int):
    ours = loss_scale(_params("tf_dynamic", initial_loss_scale=8.0, steps_per_increase=period))
    theirs = tf.compat.v1.mixed_precision.DynamicLossScale(8.0, period, 2.0)
    for one in finite:
        ours.update(one)
        theirs.update([tf.constant(1.0 if one else float("nan"))])
        assert ours.value == float(theirs())


@given(overflows, st.integers(1, 30), st.sampled_from([0.0, 0.05, 0.4]))
@example([True] * 5 + [False], 30, 0.4)
@example([True] * 8, 3, 0.0)
def test_dynamic_is_the_references(finite: list[bool], period: int, tolerance: float):
    """Halve when overflows / steps since the last change exceed the tolerance, else double after
    `period` steps; within the bounds."""
    ours = loss_scale(
        _params(
            "dynamic",
            initial_loss_scale=8.0,
            steps_per_increase=period,
            min_loss_scale=2.0,
            max_loss_scale=32.0,
            overflow_tolerance=tolerance,
        )
    )
    value, since = 8.0, []
    for one in finite:
        ours.update(one)
        since.append(one)
        if since.count(False) / len(since) > tolerance:
            value, since = value / 2, []
        elif len(since) == period:
            value, since = value * 2, []
        value = min(max(value, 2.0), 32.0)
        assert ours.value == value


def test_without_tolerance_each_overflow_halves_down_to_the_floor():
    scale = loss_scale(_params("dynamic", overflow_tolerance=0))
    for n in range(1, 30):
        scale.update(False)
        assert scale.value == 2.0 ** (15 - n)
    assert scale.at_floor
    scale.update(False)
    assert scale.value == 2.0**-14


@given(overflows, overflows, st.sampled_from(["dynamic", "tf_dynamic"]))
@settings(max_examples=20, deadline=None)
def test_the_state_is_saved_and_restored(tmp_path_factory, before, after, kind: str):
    params = _params(kind, steps_per_increase=5)
    whole, other = loss_scale(params), loss_scale(params)
    for one in before:
        whole.update(one)
    prefix = tmp_path_factory.mktemp("scale") / "x"
    write_bundle(prefix, whole.tensors())
    source = BundleSource(prefix)
    other.load(source)
    source.close()
    for one in after:
        whole.update(one)
        other.update(one)
    assert other.tensors() == whole.tensors()
    dtypes = {name: value.dtype for name, value in whole.tensors().items()}
    assert dtypes.pop(CURRENT_LOSS_SCALE) == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int64)}


@pytest.mark.parametrize("begin", [2.0**126, 1.6 * 2.0**126, float(np.finfo(np.float32).max) / 2])
def test_doubling_stops_below_infinity(begin: float):
    scale = loss_scale(_params("tf_dynamic", initial_loss_scale=begin, steps_per_increase=1))
    for _ in range(2):
        scale.update(True)
        assert scale.value == 2 * begin


@pytest.mark.parametrize("kind", ["dynamic", "tf_dynamic"])
def test_what_a_checkpoint_lacks_stays_as_it_is(kind: str):
    scale = loss_scale(_params(kind, initial_loss_scale=64.0))
    scale.update(True)
    before = scale.tensors()
    assert GOOD_STEPS in before
    scale.load(MemorySource({}))
    assert scale.tensors() == before
    assert scale.value == 64


@pytest.mark.parametrize("value", [1.0, 1024.0])
def test_a_fixed_one_never_changes(value: float):
    scale = loss_scale(_params(value))
    scale.update(False)
    assert scale.value == value
    assert scale.tensors() == {}
    assert not scale.is_dynamic
