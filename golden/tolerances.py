"""Tolerances, each with the measurement it comes from."""

from __future__ import annotations

#: Largest |Δ| of logits against Hugging Face's model, over the logits' standard deviation,
#: both computed in float32 on the same weights. Measured 2026-11 on 2 cores by `gptj verify`: at
#: most 4e-6 on random checkpoints of healthy scale (1 to 4 blocks, hidden 48 to 96, positions to
#: 2047), and 2.1e-5 on random weights of the true 6B shape in float16. A wrong rotary pairing, an
#: untransposed square projection or an exact GELU gives 1e-3 and more.
LOGITS = 1e-4

#: Factor between the tolerance of gradients and that of logits. Figure of gradients: largest |Δ| of
#: a tensor's gradient divided by its root mean square.
GRADIENTS_OVER_LOGITS = 10

#: Relative tolerance of losses, learning rates and gradient norms against recorded runs of the
#: reference. Measured: at most 5e-7 over 20 steps; tests/parity/test_golden_runs.py measures it.
TRAINING = 1e-5
