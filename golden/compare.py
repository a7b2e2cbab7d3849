"""Comparison of two models' outputs.

Shape suffixes: N tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: Tokens compared at once: float64 copies of a whole prompt's logits would take gigabytes.
_ROWS = 64
#: Number of a token's most likely successors that are compared beside the first.
TOP = 10


@dataclass(frozen=True, slots=True)
class LogitsFigures:
    """Differences of two models' logits over some tokens; arrays have one entry per token."""

    max_abs_N: np.ndarray
    """Largest |Δ| of each token's logits."""
    kl_N: np.ndarray
    """KL(reference ‖ other) of each token's distribution, in nats."""
    same_first_N: np.ndarray
    """Whether the most likely successor of each token is the same."""
    shared_top_N: np.ndarray
    """Share of the reference's ten most likely successors that are also the other model's."""
    spread: float
    """Standard deviation of the reference's logits over all tokens."""

    @property
    def max_abs(self) -> float:
        """Largest |Δ| of any logit."""
        return float(self.max_abs_N.max())

    @property
    def relative(self) -> float:
        """`max_abs` divided by `spread`: the figure that decides."""
        return over_spread(self.max_abs, self.spread)

    @property
    def max_kl(self) -> float:
        """Largest KL of any token; NaN if one is NaN."""
        return max(0.0, float(self.kl_N.max())) if np.isfinite(self.kl_N).all() else math.nan

    @property
    def top1(self) -> float:
        """Share of tokens whose most likely successor is the same."""
        return float(self.same_first_N.mean())

    @property
    def top10(self) -> float:
        """Mean of `shared_top_N`."""
        return float(self.shared_top_N.mean())

    @property
    def worst_token(self) -> int:
        """Index where `max_abs` occurs."""
        return int(self.max_abs_N.argmax())


def compare_logits(found_NV: np.ndarray, expected_NV: np.ndarray) -> LogitsFigures:
    """Return the differences, computed in float64. A NaN on either side makes them NaN, which no
    tolerance passes."""
    count = len(expected_NV)
    max_abs_N, kl_N = np.empty(count), np.empty(count)
    same_N, shared_N = np.empty(count, bool), np.empty(count)
    top = min(TOP, expected_NV.shape[1])
    total = squares = 0.0
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        found, expected = (x[rows].astype(np.float64) for x in (found_NV, expected_NV))
        max_abs_N[rows] = np.abs(found - expected).max(1)
        log_p, log_q = _log_softmax(expected), _log_softmax(found)
        kl_N[rows] = np.sum(np.exp(log_p) * (log_p - log_q), axis=1)
        same_N[rows] = found.argmax(1) == expected.argmax(1)
        best, of_other = (np.argpartition(x, -top, axis=1)[:, -top:] for x in (expected, found))
        shared_N[rows] = (best[:, :, None] == of_other[:, None, :]).any(2).mean(1)
        total += expected.sum()
        squares += np.square(expected).sum()
    mean = total / expected_NV.size
    spread = max(0.0, squares / expected_NV.size - mean**2) ** 0.5
    return LogitsFigures(max_abs_N, kl_N, same_N, shared_N, spread)


def relative_by_token(found_ND: np.ndarray, expected_ND: np.ndarray) -> np.ndarray:
    """Return the largest |Δ| of each token divided by the standard deviation of the expected
    values: (N,)."""
    spread = float(expected_ND.std(dtype=np.float64))
    deltas = np.abs(found_ND - expected_ND).max(-1)
    if spread > 0:
        return deltas / spread
    return np.array([over_spread(float(delta), spread) for delta in deltas])


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest |Δ| divided by the standard deviation of the expected values."""
    spread = float(expected.std(dtype=np.float64))
    return over_spread(float(np.abs(found - expected).max()), spread)


def over_spread(delta: float, spread: float) -> float:
    """Return |Δ| divided by a standard deviation; where that is 0, 0 or infinity."""
    if spread > 0 or np.isnan(delta) or np.isnan(spread):
        return delta / spread if spread else math.nan
    return 0.0 if delta == 0 else math.inf


def _log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    shifted = logits_NV - logits_NV.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
