"""Optimizer state as PyTorch stores it: by number, in groups, in a separate file."""

from __future__ import annotations

from typing import Any

import numpy as np

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.formats.layouts.torch_optimizer import OPTIMIZER_FILE, OptimizerSource
from gptj_convert.optimizer.decay import exclusions_of_groups
from gptj_convert.optimizer.state import (
    BETAS,
    WITHOUT,
    AdamSettings,
    OptimizerState,
    adam_settings,
    common_value,
    one_number,
    other_optimizers,
    refuse,
    scale_variables,
    whole_number,
)
from gptj_model.errors import TensorFault
from gptj_model.optimizer_names import (
    GROUPINGS,
    MOMENTS,
    STATE,
    Grouping,
    numbered_moments,
    parameter_groups,
)
from gptj_model.tensors import Scheme, table

#: Key of an optimizer.pt for what PyTorch's optimizer has no place for.
TORCH_MORE = "gptj"
#: Number of steps after which a power no longer changes: PyTorch counts steps in float32.
_LONGEST = 2**24


def from_torch(checkpoint: Checkpoint, source: OptimizerSource) -> OptimizerState:
    """Implement `find_state` for an optimizer.pt."""
    names = (*source.tensors, *source.plain)
    refuse(checkpoint, other_optimizers(names, (*MOMENTS, "step")))
    groups, config = source.groups, checkpoint.config
    grouping = _grouping(checkpoint, source)
    moments = numbered_moments(config, Scheme.HF, grouping)
    steps = {f"{STATE}{n}.step": _torch_step(source, n) for n in range(len(moments))}
    step = whole_number(checkpoint, "step", common_value(checkpoint, steps))
    try:
        settings = _torch_settings(groups)
    except (KeyError, TypeError, ValueError, IndexError, StopIteration):
        refuse(checkpoint, [f"{OPTIMIZER_FILE}: its param_groups are not those of Adam"])
        raise
    more = source.more.get(TORCH_MORE)
    kept = more if isinstance(more, dict) and more.get("step") == step else {}
    powers: dict[str, np.float32] = {}
    if settings.use_bias_correction:
        powers = {
            name: np.float32(kept[name])
            if type(kept.get(name)) is float
            else beta_power(getattr(settings, beta), step)
            for name, beta in BETAS.items()
        }
    scale = {n: v for n, v in kept.items() if type(v) in (int, float)}
    return OptimizerState(
        step=step,
        powers=powers,
        loss_scale=scale_variables(checkpoint, scale),
        moments=moments,
        settings=settings,
    )


def beta_power(beta: float, step: int) -> np.float32:
    """Return beta to the power of `step`, rounded at each step as the optimizers round it."""
    count = min(step + 1, _LONGEST)
    with np.errstate(all="ignore"):
        return np.multiply.accumulate(np.full(count, beta, np.float32))[-1]


def _grouping(checkpoint: Checkpoint, source: OptimizerSource) -> Grouping:
    """Return how the file's parameters were numbered."""
    found = [group["params"] for group in source.groups]
    for grouping in GROUPINGS[Scheme.HF]:
        groups = parameter_groups(checkpoint.config, Scheme.HF, grouping)
        numbers = iter(range(sum(map(len, groups))))
        names = [group.get("param_names") for group in source.groups]
        if found == [[next(numbers) for _ in group] for group in groups] and all(
            given is None or given == [t.hf for t in group]
            for given, group in zip(names, groups, strict=True)
        ):
            return grouping
    rows = table(checkpoint.config)
    matrices = sum(len(t.shape) > 1 for t in rows)
    sizes = " and ".join(str(len(group)) for group in found) or "no"
    raise TensorFault(
        str(checkpoint.path),
        [
            f"{OPTIMIZER_FILE}: has groups of {sizes} parameters, expected one of {len(rows)} in "
            f"the order of GPTJForCausalLM.parameters(), or those of transformers' Trainer, "
            f"{matrices} and {len(rows) - matrices}"
        ],
        hint=WITHOUT,
    )


def _torch_step(source: OptimizerSource, number: int) -> float | None:
    name = f"{STATE}{number}.step"
    if name in source.tensors:
        return one_number(source, name)
    value = source.plain.get(name)
    return float(value) if isinstance(value, int | float) else None


def _torch_settings(groups: list[dict[str, Any]]) -> AdamSettings:
    group = groups[0]
    if group.get("amsgrad"):
        raise ValueError("another rule")
    beta1, beta2 = group["betas"]
    corrects = bool(group.get("correct_bias", True))
    # The rate may be a tensor; then the initial rate of a schedule stands for it.
    rate = next(r for r in (group["lr"], group.get("initial_lr")) if isinstance(r, int | float))
    exclusions = exclusions_of_groups([float(g["weight_decay"]) for g in groups])
    decay = group["weight_decay"]
    return adam_settings(rate, beta1, beta2, group["eps"], decay, exclusions, corrects)
