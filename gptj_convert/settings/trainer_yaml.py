"""trainer.yaml of the CS client (`cszoo fit trainer.yaml`): written from a model and its training
parameters, and read back as a config.

Key names are those of the model zoo 2.10 and its model `gptj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.formats.layouts.cs import MODEL_FILE
from gptj_convert.options import CS_BACKENDS
from gptj_convert.settings.params_yaml import EPSILON, MIXED_EPSILON, MODEL_KEYS, read_yaml
from gptj_model.config import GPTJConfig, default_ends
from gptj_model.errors import ConfigError
from gptj_model.optimizer_names import ADAMS

TRAINER_FILE = "trainer.yaml"

#: Key of `trainer.init.model` → GPTJConfig field: the reference's keys, and one that the reference
#: keeps elsewhere.
_MODEL_KEYS = {"vocab_size": "vocab_size"} | MODEL_KEYS

#: Keys whose only valid value is GPT-J's. The client's own "gelu" is the exact form.
_FIXED_KEYS: dict[str, Any] = {
    "name": "gptj",
    "position_embedding_type": "rotary",
    "attention_type": "scaled_dot_product",
    "use_projection_bias_in_attention": False,
    "use_ffn_bias_in_attention": False,
    "use_ffn_bias": True,
    "use_bias_in_output": True,
    "nonlinearity": "gelu_new",
}

#: Keys that do not change what the model computes.
_TRAINING_KEYS: dict[str, Any] = {
    "initializer_range": 0.02,
    "loss_scaling": "num_tokens",
    "loss_weight": 1.0,
}

#: Keys of `trainer.init.precision` that the reference has in its section `optimizer`.
_PRECISION_KEYS = (
    "max_gradient_value",
    "loss_scaling_factor",
    "initial_loss_scale",
    "steps_per_increase",
    "min_loss_scale",
    "max_loss_scale",
)

#: Folder of the client's records, as `gptj data … --format hdf5` writes it.
_DATA = "data"
_PROCESSOR = "GptHDF5MapDataProcessor"


def trainer(
    config: GPTJConfig, params: Mapping[str, Any], backend: str = CS_BACKENDS[0]
) -> dict[str, Any]:
    """Return a complete `cszoo fit` configuration that starts from `model.mdl` beside it."""
    return trainer_from_params(config, params, checkpoint=MODEL_FILE, data=[_DATA], backend=backend)


def trainer_from_params(
    config: GPTJConfig,
    params: Mapping[str, Any],
    *,
    checkpoint: str | None,
    data: Sequence[str],
    backend: str = CS_BACKENDS[0],
) -> dict[str, Any]:
    """Return a complete `cszoo fit` configuration from the reference's parameters.

    Args:
        config: configuration of the model.
        params: content of a params.yaml.
        checkpoint: path of the `.mdl` to start from; None starts from random weights, or from the
            run's own checkpoint.
        data: folders of HDF5 records.
        backend: one of `options.CS_BACKENDS`.

    Raises:
        ConfigError: the client has no such optimizer or schedule.
    """
    optimizer, run = params["optimizer"], params.get("runconfig", {})
    mixed = bool(params.get("model", {}).get("mixed_precision"))
    inputs = params["train_input"]
    loader = {
        "data_processor": _PROCESSOR,
        "data_dir": list(data),
        # One step of the reference takes this many batches.
        "batch_size": inputs["batch_size"] * (optimizer.get("grad_accum_steps") or 1),
        "num_workers": 0,
    }
    init: dict[str, Any] = {
        "backend": {"backend_type": backend},
        "seed": run.get("tf_random_seed") or 1,
        "model_dir": "model_dir",
        "model": _model(config),
        "optimizer": _optimizer(optimizer, MIXED_EPSILON if mixed else EPSILON),
        "precision": {
            "enabled": mixed,
            "max_gradient_norm": optimizer.get("max_gradient_norm") or None,
            **{key: optimizer[key] for key in _PRECISION_KEYS if optimizer.get(key)},
        },
        "loop": {"max_steps": run.get("max_steps", 100)} | _if_set(run, "eval_steps"),
        "checkpoint": {"steps": run.get("save_checkpoints_steps", 1000)},
        "logging": {"log_steps": run.get("log_step_count_steps") or 100},
    }
    schedule = optimizer["learning_rate"]
    if not isinstance(schedule, int | float):
        init["schedulers"] = [_schedulers(_members(optimizer))]
    begin = {"ckpt_path": checkpoint} if checkpoint else {}
    return {
        "trainer": {
            "init": init,
            "fit": begin
            | {
                "train_dataloader": loader
                | {"shuffle": inputs.get("shuffle") is not False}
                | _if_set(inputs, "shuffle_seed"),
            },
            "validate": begin
            | {
                "val_dataloader": loader | {"shuffle": False},
            },
        }
    }


def _model(config: GPTJConfig) -> dict[str, Any]:
    values: dict[str, Any] = {key: getattr(config, field) for key, field in _MODEL_KEYS.items()}
    return _FIXED_KEYS | values | {"filter_size": config.ffn_dim} | _TRAINING_KEYS


def _optimizer(values: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    kind = values["optimizer_type"]
    if kind not in ADAMS:
        raise ConfigError(
            f"optimizer.optimizer_type is {kind!r}, expected 'adamw' or 'adam': the "
            "client's other optimizers differ from the reference's"
        )
    rate, is_adam = values["learning_rate"], kind == "adam"
    return {
        # Without decay and with bias correction it equals the reference's adam.
        "adamw": {
            "learning_rate": rate if isinstance(rate, int | float) else 0.0,
            "betas": [values.get("beta1", 0.9), values.get("beta2", 0.999)],
            "eps": epsilon if values.get("epsilon") is None else values["epsilon"],
            "weight_decay": 0.0 if is_adam else values.get("weight_decay_rate", 0.0),
            "correct_bias": is_adam or values.get("use_bias_correction", False),
        }
    }


def _if_set(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: values[key]} if values.get(key) else {}


def _members(optimizer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the schedules that run one after the other.

    Raises:
        ConfigError: a schedule does not count from its own start, as all of the client's do.
    """
    schedule = optimizer["learning_rate"]
    members = schedule if isinstance(schedule, list) else [schedule]
    key = "disable_lr_steps_reset"
    if len(members) > 1 and any(values.get(key) for values in (optimizer, *members)):
        raise ConfigError(
            f"optimizer.learning_rate: {key} is set, but each schedule of the CS client "
            "counts from its own start",
            hint=f"use one schedule, or leave out {key}",
        )
    return members


def scheduler_states(params: Mapping[str, Any], step: int) -> list[dict[str, Any]]:
    """Return the state that the client's schedulers hold after `step` steps: their counts."""
    schedule = params["optimizer"]["learning_rate"]
    if isinstance(schedule, int | float):
        return []
    states, begin = [], 0
    for member in _members(params["optimizer"]):
        states.append(_scheduler_state(member, max(0, step - begin)))
        begin += member.get("steps") or member.get("decay_steps") or 0
    return states if len(states) == 1 else [_counted(step) | {"_schedulers": states}]


def _scheduler_state(values: Mapping[str, Any], step: int) -> dict[str, Any]:
    if values["scheduler"] != "PiecewiseConstant":
        return _counted(step)
    begins = (0, *(boundary + 1 for boundary in values["boundaries"]))
    members = [_counted(max(0, step - begin)) for begin in begins]
    return _counted(step) | {"_schedulers": members}


def _counted(step: int) -> dict[str, Any]:
    return {"last_epoch": np.asarray(step, np.int64)}


def _schedulers(members: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = [_schedule(member, n) for n, member in enumerate(members)]
    return found[0] if len(found) == 1 else {"SequentialLR": {"schedulers": found}}


def _schedule(values: Mapping[str, Any], n: int) -> dict[str, Any]:
    """Return one schedule under the client's name; both count step 0 as their first."""
    kind = values["scheduler"]
    if kind == "Constant":
        fields = {"learning_rate": values["learning_rate"], "total_iters": values.get("steps")}
        return {"ConstantLR": {k: v for k, v in fields.items() if v is not None}}
    if kind in ("Linear", "Polynomial"):
        fields = {
            "initial_learning_rate": values["initial_learning_rate"],
            "end_learning_rate": values["end_learning_rate"],
            "total_iters": values["steps"],
        }
        if kind == "Linear":
            return {"LinearLR": fields}
        more = {"power": values.get("power", 1.0), "cycle": values.get("cycle", False)}
        return {"PolynomialLR": fields | more}
    if kind == "Cosine":
        initial = values["initial_learning_rate"]
        return {
            "CosineDecayLR": {
                "initial_learning_rate": initial,
                "end_learning_rate": values.get("alpha", 0.0) * initial,
                "total_iters": values["decay_steps"],
            }
        }
    if kind == "Exponential":
        return {
            "ExponentialLR": {
                "initial_learning_rate": values["initial_learning_rate"],
                "total_iters": values["decay_steps"],
                "decay_rate": values["decay_rate"],
                "staircase": values.get("staircase", False),
            }
        }
    if kind == "PiecewiseConstant":
        # The reference holds a value up to and including its boundary.
        return {
            "PiecewiseConstantLR": {
                "learning_rates": list(values["values"]),
                "milestones": [boundary + 1 for boundary in values["boundaries"]],
            }
        }
    raise ConfigError(f"optimizer.learning_rate[{n}]: the CS client has no {kind!r}")


def config_beside(checkpoint: Path) -> GPTJConfig | None:
    """Return the config that a trainer.yaml in the checkpoint's folder, or one folder up,
    describes.

    Raises:
        ConfigError: the file describes a model other than GPT-J.
    """
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        path = folder / TRAINER_FILE
        if path.is_file():
            return config_from_trainer(read_yaml(path), where=str(path))
    return None


def is_clients(values: Mapping[str, Any]) -> bool:
    """Return whether the content of a YAML file is the client's: a complete configuration, or the
    output of its converter, whose section `model` also holds the vocabulary size."""
    model = values.get("model")
    return "trainer" in values or (isinstance(model, dict) and "vocab_size" in model)


def config_from_trainer(values: Mapping[str, Any], *, where: str) -> GPTJConfig:
    """Return the config that the content of one of the client's YAML files describes.

    Args:
        values: parsed file.
        where: name of the file, for errors.

    Raises:
        ConfigError: the file describes no model, or a model other than GPT-J.
    """
    path = ("trainer", "init", "model") if "trainer" in values else ("model",)
    section: Any = values
    for key in path:
        if isinstance(section, list) and section:  # trainers that run one after the other
            section = section[0].get("trainer") if isinstance(section[0], dict) else None
        section = section.get(key) if isinstance(section, dict) else None
    at = ".".join(path)
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: has no section {at}")
    for key, only in _FIXED_KEYS.items():
        if section.get(key, only) != only:
            raise ConfigError(f"{where}: {at}.{key} is {section[key]!r}, expected {only!r}")
    missing = [key for key in _MODEL_KEYS if key not in section and not key.endswith("_rate")]
    if missing:
        raise ConfigError(f"{where}: {at} lacks {', '.join(missing)}")
    known: dict[str, Any] = {f: section.get(key, 0.0) for key, f in _MODEL_KEYS.items()}
    known |= default_ends(known["vocab_size"])
    try:
        return GPTJConfig(**known)
    except ConfigError as e:
        raise ConfigError(f"{where}: {e.message}") from None
