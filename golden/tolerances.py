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

#: Factor between the tolerance of log-probabilities of tokens and that of logits, in standard
#: deviations of the logits: a log-probability follows from a logit and from the normalizer of all,
#: and neither moves further than the worst logit.
LIKELIHOODS_OVER_LOGITS = 2

#: Relative tolerance of losses, learning rates and gradient norms against recorded runs of the
#: reference. Measured: at most 5e-7 over 20 steps; tests/parity/test_golden_runs.py measures it.
TRAINING = 1e-5

#: Largest norm of a difference between flash attention and the plain product over the norm of the
#: latter, by compute dtype: of the output of one block's attention, and of its gradients. Measured
#: 2026-11 on a CPU with XLA's kernel in bfloat16, with up to 512 tokens: at most 4.2e-3 at the 6B's
#: width, 4.6e-3 with small heads; a scale that is wrong by a tenth gives 0.1 to 0.18. float16
#: rounds 8 times finer, but GPUs round the plain product to as many bits (TF32). Not measured with
#: cuDNN yet. `gptj_model.network.flash_attention.differences` measures it.
FLASH_ATTENTION = {"bfloat16": 1e-2, "float16": 4e-3}
