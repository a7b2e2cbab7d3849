"""The loss of logits that come in parts is the loss of them all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_model.loss import RunningLoss, token_loss


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    part=st.integers(1, 41),
    scale=st.sampled_from([0.1, 1.0, 30.0, 1000.0]),
)
def test_in_parts(seed: int, tokens: int, vocabulary: int, part: int, scale: float):
    random = np.random.default_rng(seed)
    logits = (scale * random.normal(size=(tokens, vocabulary))).astype(np.float32)
    labels = random.integers(0, vocabulary, tokens).astype(np.int32)
    ignored = random.integers(0, 2, tokens).astype(np.float32)
    running = RunningLoss(labels)
    for start in range(0, vocabulary, part):
        running.add(logits[:, start : start + part], 0, start)
    found, expected = running.sums(ignored), token_loss(logits[None], labels[None], ignored[None])
    assert float(found.total) == pytest.approx(float(expected.total), rel=1e-5, abs=1e-4)
    assert float(found.count) == float(expected.count)
    assert float(found.correct) == float(expected.correct)
    assert float(found.mean) == pytest.approx(float(expected.mean), rel=1e-5, abs=1e-4)
