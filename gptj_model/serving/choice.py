"""Choice of the next token in TensorFlow's operations, as `gptj_model.decoding.processors` and
`choose` make it in numpy.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from gptj_model.network.array_type import Tensor

#: Decimal places that are left of a float32 between 0 and 1.
_PLACES = 1e7


class Sampling(NamedTuple):
    """How tokens are drawn; every field is a scalar."""

    temperature: Tensor
    """Divisor of the logits, float32; 0 takes the most likely token."""
    top_k: Tensor
    """Number of most likely tokens to draw from, with those as likely as the last, int32; 0 means
    all."""
    top_p: Tensor
    """Probability that the tokens to draw from add up to, float32."""


def chosen(logits_BV: Tensor, drawn_B: Tensor, sampling: Sampling) -> Tensor:
    """Return the next token of each sequence, int32 (B,).

    Args:
        logits_BV: float32 logits.
        drawn_B: float64 number from 0 to 1 of each sequence, unused where the most likely token is
            taken.
        sampling: how tokens are drawn.
    """
    return tf.cond(
        sampling.temperature > 0,
        lambda: _sampled(logits_BV, drawn_B, sampling),
        lambda: tf.argmax(logits_BV, axis=-1, output_type=tf.int32),
    )


def _sampled(logits_BV: Tensor, drawn_B: Tensor, sampling: Sampling) -> Tensor:
    V = tf.shape(logits_BV)[1]
    scores_BV, order_BV = tf.math.top_k(logits_BV / sampling.temperature, V)
    finite = tf.debugging.Assert(
        tf.reduce_all(tf.math.is_finite(scores_BV[:, 0])),
        ["no token can be drawn: scores are not finite"],
    )
    with tf.control_dependencies([finite]):
        scores_BV = tf.identity(scores_BV)
    scores_BV = tf.cond(
        sampling.top_k > 0, lambda: _top_k(scores_BV, sampling.top_k), lambda: scores_BV
    )
    scores_BV = tf.cond(
        sampling.top_p < 1, lambda: _top_p(scores_BV, sampling.top_p), lambda: scores_BV
    )
    mass_BV = tf.cumsum(_softmax(tf.cast(scores_BV, tf.float64)), axis=1)
    mass_BV /= mass_BV[:, -1:]
    place_B = tf.reduce_sum(tf.cast(mass_BV <= drawn_B[:, None], tf.int32), axis=1)
    return tf.gather(order_BV, place_B, axis=1, batch_dims=1)


def _top_k(scores_BV: Tensor, top_k: Tensor) -> Tensor:
    """Return scores, the best first, without those worse than the k-th."""
    last_B1 = scores_BV[:, tf.minimum(top_k, tf.shape(scores_BV)[1]) - 1][:, None]
    return tf.where(scores_BV < last_B1, -float("inf"), scores_BV)


def _top_p(scores_BV: Tensor, top_p: Tensor) -> Tensor:
    """Return scores, the best first, without the worst ones whose probabilities add up to at most
    1 - p; the best one stays."""
    # From the worst to the best, in the precisions of numpy's code.
    rising_BV = _softmax(tf.reverse(scores_BV, [1]))
    mass_BV = tf.cast(tf.cumsum(tf.cast(rising_BV, tf.float64), axis=1), tf.float32)
    # The float32 of 0.9 means 0.9.
    rest = 1.0 - tf.round(tf.cast(top_p, tf.float64) * _PLACES) / _PLACES
    removed_BV = tf.reverse(mass_BV <= tf.cast(rest, tf.float32), [1])
    is_best_1V = tf.range(tf.shape(scores_BV)[1])[None] == 0
    return tf.where(removed_BV & ~is_best_1V, -float("inf"), scores_BV)


def _softmax(scores_BV: Tensor) -> Tensor:
    exp_BV = tf.exp(scores_BV - tf.reduce_max(scores_BV, axis=1, keepdims=True))
    return exp_BV / tf.reduce_sum(exp_BV, axis=1, keepdims=True)
