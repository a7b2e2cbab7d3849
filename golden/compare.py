"""How two models' outputs are set side by side.

Shape suffixes: T time, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    found_TV, expected_TV = found_TV.astype(np.float64), expected_TV.astype(np.float64)
    delta_TV = np.abs(found_TV - expected_TV)
    spread = float(expected_TV.std())
    max_abs = float(delta_TV.max())
    log_p, log_q = _log_softmax(expected_TV), _log_softmax(found_TV)
    kl_T = np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)
    same_T = found_TV.argmax(-1) == expected_TV.argmax(-1)
    return LogitsFigures(
        max_abs=max_abs,
        relative=max_abs / spread if spread > 0 else (0.0 if max_abs == 0 else np.inf),
        max_kl=max(0.0, float(kl_T.max())) if np.isfinite(kl_T).all() else float("nan"),
        top1=float(same_T.mean()),
        worst_token=int(delta_TV.max(-1).argmax()),
    )


def relative_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest |Δ| divided by the standard deviation of what is expected."""
    spread = float(expected.std(dtype=np.float64))
    delta = float(np.abs(found - expected).max())
    return delta / spread if spread > 0 else (0.0 if delta == 0 else float("inf"))


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
