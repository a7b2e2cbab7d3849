"""Optimizer state as TensorFlow checkpoints store it: by name."""

from __future__ import annotations

import numpy as np

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.optimizer.state import (
    BETAS,
    LOSS_SCALE,
    OptimizerState,
    one_number,
    refuse,
    scale_variables,
    whole_number,
)
from gptj_model.optimizer_names import ADAMS, named_moments
from gptj_model.tensors import GLOBAL_STEP, LORA_ALPHA, SLOTS


def from_tf(checkpoint: Checkpoint) -> OptimizerState | None:
    """Implement `find_state` for a TensorFlow checkpoint."""
    source = checkpoint.source
    slots = {name.rsplit("/", 1)[-1] for name in source.tensors if "/" in name}
    kinds = [kind for kind, suffixes in SLOTS.items() if slots.intersection(suffixes)]
    if not kinds:
        return None
    others = [kind for kind in kinds if kind not in ADAMS]
    refuse(
        checkpoint, (f"holds slots of {kind}, expected of {' or '.join(ADAMS)}" for kind in others)
    )
    if LORA_ALPHA in source.tensors:
        refuse(checkpoint, ["its moments are those of a LoRA adapter, not of the weights"])
    kind = next(kind for kind in ADAMS if kind in kinds)
    names = (GLOBAL_STEP, *BETAS, *LOSS_SCALE)
    read = {name: one_number(source, name) for name in names if name in source.tensors}
    needed = (GLOBAL_STEP, *(BETAS if BETAS.keys() & read.keys() else ()))
    refuse(checkpoint, (f"{name!r} is missing" for name in needed if name not in read))
    refuse(checkpoint, (f"{name!r} is not one number" for name in read if read[name] is None))
    return OptimizerState(
        step=whole_number(checkpoint, GLOBAL_STEP, read[GLOBAL_STEP]),
        powers={name: np.float32(read[name]) for name in BETAS if name in read},
        loss_scale=scale_variables(checkpoint, read),
        moments=named_moments(checkpoint.config, kind),
        settings=None,
    )
