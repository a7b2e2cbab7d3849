"""The loss of logits that come in parts is the loss of them all."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_model.network import loss
from gptj_model.network.loss import RunningLoss, head_loss, token_loss


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


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("logits", [1, 4 * 5, 10**9])
def test_of_the_head_in_chunks(logits: int, devices: int, monkeypatch: pytest.MonkeyPatch):
    """For any size of chunk, loss and gradients are those of all tokens at once."""
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", logits)
    random = np.random.default_rng(5)
    h, kernel, bias = (random.normal(size=s).astype(np.float32) for s in ((2, 6, 3), (3, 5), 5))
    labels = random.integers(0, 5, (2, 6)).astype(np.int32)
    ignored = random.integers(0, 2, (2, 6)).astype(np.float32)
    inputs = [tf.constant(x) for x in (h, kernel, bias)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        found = head_loss(*inputs, labels, ignored, training=True, devices=devices)
        expected = token_loss(inputs[0] @ inputs[1] + inputs[2], labels, ignored)
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    pairs = (tape.gradient(sums.total, inputs) for sums in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
