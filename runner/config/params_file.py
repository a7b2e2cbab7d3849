"""Read and check a params.yaml, reporting every problem with its line and path at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptj_convert.settings.params_yaml import TRAINING_FIELDS, line_finder, read_yaml
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from runner.config import params as p
from runner.config.other_configs import other_program
from runner.config.params import SCHEDULES, Params

#: Fields on which the YAML and the checkpoint must agree.
_ARCHITECTURE = (
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
    "ffn_dim",
    "rotary_dim",
    "layer_norm_epsilon",
    "tie_word_embeddings",
)

#: Function from the path of a value in the YAML to its line in the file, or None.
Line = Callable[[Sequence[Any]], int | None]

_SECTIONS: dict[str, type[p.Section]] = {
    "train_input": p.InputParams,
    "eval_input": p.InputParams,
    "model": p.ModelParams,
    "optimizer": p.OptimizerParams,
    "runconfig": p.RunConfig,
}


_SUBSECTIONS: dict[str, type[p.Section]] = {
    "lora": p.LoraParams,
    "early_stopping": p.EarlyStopping,
}


def load_params(path: Path, settings: Mapping[str, Any] | None = None) -> Params:
    """Read and validate a params.yaml.

    Args:
        path: params.yaml to read.
        settings: values that replace those of the file, by dotted keys such as
            `optimizer.epsilon`.

    Raises:
        ConfigError: the file is invalid; lists every problem with its line and path in the YAML.
    """
    values = read_yaml(path)
    if other := other_program(values):
        program, hint = other
        raise ConfigError(
            f"{path}: is a configuration of {program}, expected the sections "
            f"{', '.join(_SECTIONS)}",
            hint=hint,
        )
    return validate(values, settings or {}, where=str(path), line=line_finder(path))


def validate(
    values: dict[str, Any],
    settings: Mapping[str, Any],
    *,
    where: str,
    line: Line = lambda path: None,
) -> Params:
    """Validate parsed parameters; see `load_params`."""
    for key, value in settings.items():
        _set(values, key.split("."), value)
    try:
        params = Params.model_validate(values)
    except ValidationError as e:
        lines = [_describe(error, values, line, settings) for error in e.errors()]
        raise ConfigError("\n  ".join([f"{where}:", *dict.fromkeys(lines)])) from None
    problems = _contradictions(params)
    if problems:
        raise ConfigError("\n  ".join([f"{where}:", *problems]))
    return params


def reconcile(params: Params, config: GPTJConfig, where: Path) -> GPTJConfig:
    """Return the checkpoint's configuration with the dropout rates of the YAML.

    Raises:
        ConfigError: the YAML and the checkpoint disagree on the architecture.
    """
    given = params.config
    problems = [
        f"{n} is {getattr(given, n)!r} in the YAML, {getattr(config, n)!r} in the checkpoint"
        for n in _ARCHITECTURE
        if getattr(given, n) != getattr(config, n)
    ]
    # Positions have no weights, so training may use shorter sequences than the checkpoint.
    if given.n_positions > config.n_positions:
        problems.append(
            f"n_positions is {given.n_positions} in the YAML, expected at most "
            f"{config.n_positions}, as in the checkpoint"
        )
    if problems:
        raise ConfigError(
            f"{where}: " + "; ".join(problems),
            hint="use the params.yaml that `gptj convert` wrote beside the checkpoint",
        )
    return replace(config, **{n: getattr(given, n) for n in TRAINING_FIELDS})


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {'.'.join(path)}: {key} is not a section")
    values[path[-1]] = value


def _contradictions(params: Params) -> list[str]:
    problems = []
    optimizer = params.optimizer
    if optimizer.max_gradient_norm and optimizer.max_gradient_value:
        problems.append(
            "optimizer: max_gradient_norm and max_gradient_value are both set, expected at most one"
        )
    if optimizer.min_loss_scale > optimizer.max_loss_scale:
        problems.append(
            f"optimizer.min_loss_scale is {optimizer.min_loss_scale}, "
            f"expected at most max_loss_scale ({optimizer.max_loss_scale})"
        )
    for n, schedule in enumerate(optimizer.learning_rate):
        where = f"optimizer.learning_rate[{n}]"
        if isinstance(schedule, p.PiecewiseConstant):
            if len(schedule.values) != len(schedule.boundaries) + 1:
                problems.append(
                    f"{where}: found {len(schedule.values)} values and {len(schedule.boundaries)} "
                    "boundaries, expected one value more than boundaries"
                )
            if sorted(set(schedule.boundaries)) != schedule.boundaries:
                problems.append(f"{where}: boundaries are not in ascending order")
        last = n == len(optimizer.learning_rate) - 1
        if not last and not isinstance(schedule, p.Cosine) and schedule.steps is None:
            problems.append(f"{where}: steps is missing, expected in every schedule but the last")
    for name in ("embedding_initializer", "initializer", "output_layer_initializer"):
        for spec in getattr(params.model, name) or ():
            if spec.name == "variance_scaling" and (spec.scale is None) == (
                spec.scale_type is None
            ):
                problems.append(f"model.{name}: expected exactly one of scale and scale_type")
    for pattern in params.model.frozen:
        try:
            re.compile(pattern)
        except re.error as e:
            problems.append(f"model.frozen is {pattern!r}, expected a regular expression: {e}")
    for name in ("train_input", "eval_input"):
        section = getattr(params, name)
        limit = params.model.max_position_embeddings
        if section and section.max_sequence_length > limit:
            problems.append(
                f"{name}.max_sequence_length is {section.max_sequence_length}, "
                f"expected at most model.max_position_embeddings ({limit})"
            )
    return problems


def _describe(error: Any, values: Any, line: Line, settings: Iterable[str]) -> str:
    """Describe a pydantic error in one line: place, value found, and value expected."""
    location = [part for part in error["loc"] if part not in SCHEDULES and part != "float"]
    location = [part for part in location if not str(part).startswith("literal[")]
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    number = line(location)
    if any(path == key or path.startswith((f"{key}.", f"{key}[")) for key in settings):
        at = "--set: "
    else:
        at = f"line {number}: " if number else ""
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys(location[:-1], values), n=1)
        return f"{at}{path} is not a known key" + (f", did you mean {near[0]!r}?" if near else "")
    if error["type"] == "missing":
        return f"{at}{path} is missing"
    return f"{at}{path} is {str(error['input'])[:80]!r}, {_expected(error)}"


def _expected(error: Any) -> str:
    message = error["msg"]
    return message[0].lower() + message[1:]


def _keys(location: Sequence[Any], values: Any) -> list[str]:
    """Return the keys that are valid in the section at a location."""
    if not location:
        return list(Params.model_fields)
    section: Any = _SECTIONS.get(str(location[0]))
    if section and len(location) > 1:
        if str(location[1]).endswith("initializer"):
            return list(p.Initializer.model_fields)
        if location[1] in _SUBSECTIONS:
            return list(_SUBSECTIONS[str(location[1])].model_fields)
        for part in location:
            # A single schedule may be written without a list.
            values = values[part] if not isinstance(values, dict) or part in values else values
        section = SCHEDULES.get(values.get("scheduler"))
    return list(section.model_fields) if section else []
