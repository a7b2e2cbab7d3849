"""numpy's random numbers, drawn in TensorFlow."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptj_model.serving.numpy_random import default_rng, uniform

SEEDS, DRAWS = 8, 5


@pytest.fixture(scope="module")
def draw():
    @tf.function(autograph=False)
    def draw(seeds):
        generators, drawn = default_rng(seeds), []
        for _ in range(DRAWS):
            generators, numbers = uniform(generators)
            drawn.append(numbers)
        return tf.stack(drawn, axis=1)

    return draw


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=SEEDS, max_size=SEEDS))
@example([0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 1, 2**62, 2**63 - 1])
def test_draws_are_those_of_numpy(draw, seeds: list[int]):
    found = draw(tf.constant(seeds, tf.int64)).numpy()
    expected = [np.random.default_rng(seed).random(DRAWS) for seed in seeds]
    np.testing.assert_array_equal(found, expected)
