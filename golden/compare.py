"""How two models' outputs are set side by side.

Shape suffixes: T time, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Tokens compared at once: float64 copies of a whole prompt's logits would take gigabytes.
_ROWS = 64


@dataclass(frozen=True, slots=True)
class LogitsFigures:
    """Differences of two models' logits over one prompt."""

    max_abs: float
    """Largest |Δ| of any logit."""
    relative: float
    """`max_abs` over the standard deviation of the reference's logits: the verdict's figure."""
    max_kl: float
    """Largest KL(reference ‖ other) of one token's distribution, in nats."""
    top1: float
    """Share of tokens whose most likely successor is the same."""
    worst_token: int
    """Index in the prompt where `max_abs` occurs."""


def compare_logits(found_TV: np.ndarray, expected_TV: np.ndarray) -> LogitsFigures:
    """Figures in float64. A NaN on either side makes the figures NaN, which no tolerance passes."""
    max_abs_T = np.empty(len(expected_TV))
    kl_T, same_T = np.empty_like(max_abs_T), np.empty_like(max_abs_T)
    total = squares = 0.0
    for start in range(0, len(expected_TV), _ROWS):
        rows = slice(start, start + _ROWS)
        found, expected = (x[rows].astype(np.float64) for x in (found_TV, expected_TV))
        max_abs_T[rows] = np.abs(found - expected).max(-1)
        log_p, log_q = _log_softmax(expected), _log_softmax(found)
        kl_T[rows] = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
        same_T[rows] = found.argmax(-1) == expected.argmax(-1)
        total += expected.sum()
        squares += np.square(expected).sum()
    mean = total / expected_TV.size
    spread = max(0.0, squares / expected_TV.size - mean**2) ** 0.5
    max_abs = float(max_abs_T.max())
    return LogitsFigures(
        max_abs=max_abs,
        relative=_relative(max_abs, spread),
        max_kl=max(0.0, float(kl_T.max())) if np.isfinite(kl_T).all() else float("nan"),
        top1=float(same_T.mean()),
        worst_token=int(max_abs_T.argmax()),
    )


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest |Δ| divided by the standard deviation of what is expected."""
    spread = float(expected.std(dtype=np.float64))
    return _relative(float(np.abs(found - expected).max()), spread)


def _relative(delta: float, spread: float) -> float:
    if spread > 0 or np.isnan(delta) or np.isnan(spread):
        return delta / spread if spread else float("nan")
    return 0.0 if delta == 0 else float("inf")


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
