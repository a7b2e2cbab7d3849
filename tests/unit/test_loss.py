"""The head's loss in chunks against all logits at once, in value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from gptj_model import loss as losses
from gptj_model.config import GPTJConfig
from gptj_model.model import GPTJ
from tests.small_model import SMALL


def _sums_and_gradients(function, *variables: tf.Variable):
    with tf.GradientTape() as tape:
        found = function(*variables)
        mean = found.mean
    return [np.asarray(x) for x in found], tape.gradient(mean, variables)


@pytest.mark.parametrize("chunk", [2**24, 37 * 8, 37])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_are_the_whole(chunk: int, masked: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", chunk)
    random = np.random.default_rng(2)
    B, T, D, V = 4, 6, 16, 37
    h = tf.Variable(random.normal(size=(B, T, D)), dtype=tf.float32)
    kernel = tf.Variable(random.normal(size=(D, V)), dtype=tf.float32)
    bias = tf.Variable(random.normal(size=V), dtype=tf.float32)
    labels = tf.constant(random.integers(0, V, (B, T)), tf.int32)
    ignored = tf.constant(random.integers(0, 2, (B, T)) * masked, tf.float32)

    def whole(h, kernel, bias):
        return losses.token_loss(h @ kernel + bias, labels, ignored)

    def chunked(h, kernel, bias):
        return losses.head_loss(h, kernel, bias, labels, ignored, training=True)

    expected, slopes = _sums_and_gradients(whole, h, kernel, bias)
    found, ours = _sums_and_gradients(tf.function(chunked), h, kernel, bias)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    for mine, theirs in zip(ours, slopes, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
    evaluated = losses.head_loss(h, kernel, bias, labels, ignored)
    np.testing.assert_allclose([np.asarray(x) for x in evaluated], expected, rtol=2e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_recomputed_gradients_are_the_kept_ones(tied: bool):
    """Dropout draws the same masks when a block is computed again."""
    rates = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
    config = GPTJConfig.preset("tiny", **SMALL, **rates, tie_word_embeddings=tied)
    random = np.random.default_rng(4)
    ids = tf.constant(random.integers(0, SMALL["vocab_size"], (2, 9)), tf.int32)
    values = None
    found = []
    for recompute in (False, True):
        model = GPTJ(config, recompute=recompute)
        if values is None:
            values = [random.normal(size=w.shape) * 0.1 for w in model.trainable_weights]
        model.set_weights([*values, *model.get_weights()[len(values) :]])
        model.seeds.state.assign([3, 4])

        @tf.function
        def step(model=model):
            with tf.GradientTape() as tape:
                loss = model.token_loss(ids, ids, tf.zeros_like(ids), training=True).mean
            weights = [w.value for w in model.trainable_weights]
            return loss, [tf.convert_to_tensor(g) for g in tape.gradient(loss, weights)]

        found.append(step())
    (kept, gradients), (again, recomputed) = found
    assert float(kept) == pytest.approx(float(again), rel=1e-6)
    for a, b in zip(gradients, recomputed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
