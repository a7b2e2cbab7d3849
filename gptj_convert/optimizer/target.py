"""What a new checkpoint holds beside weights and moments, so that training can resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptj_convert.optimizer.decay import group_decays
from gptj_convert.optimizer.from_cs import CS_LOSS_SCALE, CS_SCALER
from gptj_convert.optimizer.from_torch import TORCH_MORE
from gptj_convert.optimizer.state import DTYPE, AdamSettings, OptimizerState
from gptj_model.config import GPTJConfig
from gptj_model.optimizer_names import MOMENTS, STATE, Grouping, numbered_moments, parameter_groups
from gptj_model.source import TensorInfo
from gptj_model.tensors import GLOBAL_STEP, Scheme


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """Optimizer state to be carried over, and the parameters that a run resumes with."""

    state: OptimizerState
    settings: AdamSettings
    """Settings of the optimizer at that step."""
    params: Mapping[str, Any]
    """Content of a params.yaml."""
    grouping: Grouping = Grouping.ONE
    """How the new checkpoint numbers the parameters, where it does."""


def cs_tree(
    config: GPTJConfig,
    state: OptimizerState,
    settings: AdamSettings,
    grouping: Grouping,
    schedulers: list[dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what the CS client keeps beside the model, and the values of its small tensors by
    path.

    Args:
        config: configuration of the model.
        state: optimizer state to store.
        settings: settings of the optimizer at that step.
        grouping: how the parameters are numbered.
        schedulers: state of each scheduler, as a dict of arrays.
    """
    values: dict[str, np.ndarray] = {}

    def tensor(path: str, value: np.ndarray) -> TensorInfo:
        values[path] = value
        return TensorInfo(value.dtype.name, value.shape)

    def tensors(tree: Any, path: str) -> Any:
        match tree:
            case dict():
                return {key: tensors(value, f"{path}.{key}") for key, value in tree.items()}
            case list():
                return [tensors(value, f"{path}.{n}") for n, value in enumerate(tree)]
            case _:
                return tensor(path, tree)

    groups = parameter_groups(config, Scheme.CS, grouping)
    decays = group_decays(config, Scheme.CS, grouping, settings)
    rows = [t for group in groups for t in group]
    kept = {
        n: dict.fromkeys(MOMENTS, TensorInfo(DTYPE, t.shape))
        | tensors({k: np.asarray(v) for k, v in state.powers.items()}, f"{STATE}{n}")
        for n, t in enumerate(rows)
    }
    shared = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "l2_regularization_rate": 0.0,
        "correct_bias": bool(state.powers),
        "amsgrad": False,
    }
    numbers = iter(range(len(rows)))
    param_groups = [
        {"weight_decay": decay, **shared, "params": [next(numbers) for _ in group]}
        for decay, group in zip(decays, groups, strict=True)
    ]
    tree: dict[str, Any] = {
        "optimizer": {"state": kept, "param_groups": param_groups},
        "global_step": state.step,
    }
    if state.loss_scale:
        kept_scale = state.loss_scale
        scale = {cs: kept_scale[tf] for tf, cs in CS_LOSS_SCALE.items() if tf in kept_scale}
        tree[CS_SCALER] = tensors(scale, CS_SCALER)
    if schedulers:
        tree["schedulers"] = tensors(schedulers, "schedulers")
    return tree, values


def torch_state(
    config: GPTJConfig, state: OptimizerState, settings: AdamSettings, grouping: Grouping
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Return state, param_groups and further keys of an optimizer.pt; see `optimizer_file`."""
    groups = parameter_groups(config, Scheme.HF, grouping)
    names = numbered_moments(config, Scheme.HF, grouping)
    rows = [t for group in groups for t in group]
    step = np.float32(state.step).tobytes()
    kept = {
        n: {"step": step, **dict(zip(MOMENTS, names[t.hf], strict=True))}
        for n, t in enumerate(rows)
    }
    numbers = iter(range(len(rows)))
    decays = group_decays(config, Scheme.HF, grouping, settings)
    param_groups = [
        {
            "lr": settings.learning_rate,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.epsilon,
            "weight_decay": decay,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
            "correct_bias": bool(state.powers),
            "params": [next(numbers) for _ in group],
        }
        for decay, group in zip(decays, groups, strict=True)
    ]
    more = {name: value.item() for name, value in state.scalars.items() if name != GLOBAL_STEP}
    return kept, param_groups, {TORCH_MORE: {"step": state.step, **more}}
