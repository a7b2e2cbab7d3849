"""Optimizer state as the CS client stores it: by number, in a tree."""

from __future__ import annotations

import numpy as np

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.formats.layouts.cs import CsSource
from gptj_convert.optimizer.decay import exclusions_of_groups
from gptj_convert.optimizer.state import (
    BETAS,
    AdamSettings,
    OptimizerState,
    adam_settings,
    common_value,
    other_optimizers,
    refuse,
    scale_variables,
    whole_number,
)
from gptj_model.optimizer_names import MOMENTS, STATE, Grouping, numbered_moments
from gptj_model.tensors import (
    CURRENT_LOSS_SCALE,
    OVERFLOWS_SINCE_RESCALE,
    SKIPPED_STEPS,
    STEPS_SINCE_RESCALE,
    Scheme,
    table,
)

#: Variables of a dynamic loss scale, and their paths in the CS client's tree.
CS_LOSS_SCALE = {
    CURRENT_LOSS_SCALE: "loss_scale",
    STEPS_SINCE_RESCALE: "steps_since_rescale",
    OVERFLOWS_SINCE_RESCALE: "overflows_since_rescale",
    SKIPPED_STEPS: "num_skipped_steps",
}
CS_SCALER = "grad_scaler"
#: Weight decay of norms and biases.
_SECOND_DECAY = "optimizer.param_groups.1.weight_decay"


def from_cs(checkpoint: Checkpoint) -> OptimizerState | None:
    """Implement `find_state` for a `.mdl`."""
    source = checkpoint.source
    assert isinstance(source, CsSource)
    stored = [name for name in source.tensors if name.startswith(STATE)]
    if not stored:
        return None
    refuse(checkpoint, other_optimizers(stored, (*MOMENTS, *BETAS)))
    step = source.number("global_step")
    keys = [f"{STATE}{n}" for n in range(len(table(checkpoint.config)))]
    powers = {
        name: common_value(checkpoint, {f"{k}.{name}": source.number(f"{k}.{name}") for k in keys})
        for name in BETAS
        if f"{STATE}0.{name}" in source.tensors
    }
    scale = {tf: source.number(f"{CS_SCALER}.{cs}") for tf, cs in CS_LOSS_SCALE.items()}
    return OptimizerState(
        step=whole_number(checkpoint, "global_step", step),
        powers={name: np.float32(power) for name, power in powers.items()},
        # A fixed scale is a number, not a tensor.
        loss_scale=scale_variables(checkpoint, scale)
        if f"{CS_SCALER}.loss_scale" in source.tensors
        else {},
        moments=numbered_moments(checkpoint.config, Scheme.CS, Grouping.DECAY),
        settings=_cs_settings(checkpoint, source),
    )


def _cs_settings(checkpoint: Checkpoint, source: CsSource) -> AdamSettings | None:
    """Return the settings of the first group, which holds the matrices, and the decay of each
    group."""
    group = "optimizer.param_groups.0"
    keys = ("lr", "betas.0", "betas.1", "eps", "weight_decay", "correct_bias")
    lr, beta1, beta2, eps, decay, corrects = (source.number(f"{group}.{key}") for key in keys)
    if source.number(f"{group}.l2_regularization_rate"):
        refuse(
            checkpoint,
            ["its optimizer adds the weights to the gradients, as none here does"],
        )
    if None in (lr, beta1, beta2, eps, decay):
        return None
    try:
        exclusions = exclusions_of_groups((decay, source.number(_SECOND_DECAY)))
    except ValueError:
        refuse(checkpoint, [f"'{_SECOND_DECAY}' is neither 0 nor the decay of the first group"])
        raise
    corrects = corrects is None or bool(corrects)
    return adam_settings(lr, beta1, beta2, eps, decay, exclusions, corrects)
