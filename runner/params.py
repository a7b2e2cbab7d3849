"""The reference's params.yaml, validated: every key it accepts, with its default.

What the reference accepts but this program does not do is refused by name and value, never
ignored in silence.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gptj_convert.reference_yaml import (
    FIXED_MODEL_KEYS,
    TRAINING_FIELDS,
    config_from_model_section,
    read_yaml,
    yaml_text,
)
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError

#: Tokens per byte of text, by data set, for bits per byte.
TOKENS_PER_BYTE = {"pile": 0.29335, "openwebtext2": 0.2434}


#: What YAML and checkpoint must agree on.
_ARCHITECTURE = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "ffn_dim",
    "rotary_dim",
    "layer_norm_epsilon",
    "tie_word_embeddings",
)


class Section(BaseModel):
    """A mapping in the YAML whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Positive = Annotated[int, Field(gt=0, strict=True)]
Natural = Annotated[int, Field(ge=0, strict=True)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class InputParams(Section):
    """`train_input` and `eval_input`."""

    data_processor: Literal["GptTfRecordsProcessor"] = "GptTfRecordsProcessor"
    data_dir: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    vocab_size: Positive | None = None
    vocab_file: str | None = None
    max_sequence_length: Positive
    batch_size: Positive
    shuffle: bool | None = None
    shuffle_seed: int | None = None
    shuffle_buffer: Positive | None = None
    repeat: bool | None = None
    n_parallel_reads: Positive = 4
    use_multiple_workers: Literal[False] = False
    skip_steps: Natural = 0


class ModelParams(Section):
    """`model`; the architecture is read by `gptj_convert.reference_yaml`."""

    hidden_size: Positive
    num_heads: Positive
    num_hidden_layers: Positive = 1
    filter_size: Positive | None = None
    nonlinearity: str = FIXED_MODEL_KEYS["nonlinearity"]
    rotary_dim: int = -1
    max_position_embeddings: Positive
    layer_norm_epsilon: float = 1e-8
    share_embedding_weights: bool = True
    use_bias_in_output: bool = True
    use_projection_bias_in_attention: bool = False
    use_ffn_bias_in_attention: bool = False
    use_ffn_bias: bool = True
    use_untied_layer_norm: bool = False
    use_position_embeddings: bool = False
    embedding_dropout_rate: Fraction = 0.0
    attention_dropout_rate: Fraction = 0.0
    residual_dropout_rate: Fraction = 0.0
    embedding_initializer: list[dict[str, Any]] | None = None
    initializer: list[dict[str, Any]] | None = None
    output_layer_initializer: list[dict[str, Any]] | None = None
    mixed_precision: Literal[False] = False
    boundary_casting: bool = False
    tf_summary: bool = False
    use_cache: bool = False
    backbone_only: Literal[False] = False
    dropout_seed: Natural | None = None
    weight_initialization_seed: int | None = None
    bits_per_x_dataset: str | None = None


class Constant(Section):
    """learning_rate, always."""

    scheduler: Literal["Constant"]
    learning_rate: Rate
    steps: Positive | None = None
    disable_lr_steps_reset: bool = False


class Linear(Section):
    """From initial to end in so many steps, then end."""

    scheduler: Literal["Linear"]
    initial_learning_rate: Rate
    end_learning_rate: Rate
    steps: Positive
    disable_lr_steps_reset: bool = False


class Polynomial(Section):
    """From initial to end along a power, then end; or again and again with `cycle`."""

    scheduler: Literal["Polynomial"]
    initial_learning_rate: Rate
    end_learning_rate: Rate
    steps: Positive
    power: Number = 1.0
    cycle: bool = False
    disable_lr_steps_reset: bool = False


class Cosine(Section):
    """Half a cosine from initial to alpha · initial, then that."""

    scheduler: Literal["Cosine"]
    initial_learning_rate: Rate
    decay_steps: Positive
    alpha: Number = 0.0
    disable_lr_steps_reset: bool = False


class Exponential(Section):
    """initial · decay_rate^(t / decay_steps), in stairs or not."""

    scheduler: Literal["Exponential"]
    initial_learning_rate: Rate
    decay_steps: Positive
    decay_rate: Rate
    staircase: bool = False
    steps: Positive | None = None
    disable_lr_steps_reset: bool = False


class PiecewiseConstant(Section):
    """values[n] up to and including boundaries[n]; the last value after them all."""

    scheduler: Literal["PiecewiseConstant"]
    boundaries: Annotated[list[Natural], Field(min_length=1)]
    values: Annotated[list[Rate], Field(min_length=2)]
    steps: Positive | None = None
    disable_lr_steps_reset: bool = False


Schedule = Annotated[
    Constant | Linear | Polynomial | Cosine | Exponential | PiecewiseConstant,
    Field(discriminator="scheduler"),
]


def _as_schedules(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [{"scheduler": "Constant", "learning_rate": value}]
    return _as_list(value)


class OptimizerParams(Section):
    """`optimizer`."""

    optimizer_type: Literal["sgd", "momentum", "adam", "adamw", "rmsprop"]
    learning_rate: Annotated[list[Schedule], BeforeValidator(_as_schedules), Field(min_length=1)]
    momentum: Fraction = 0.9
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Rate = 1e-8
    rmsprop_decay: Fraction = 0.9
    rmsprop_momentum: Fraction = 0.0
    weight_decay_rate: Rate = 0.0
    exclude_from_weight_decay: list[str] = ["LayerNorm", "layer_norm", "bias", "Bias"]
    use_bias_correction: bool = False
    max_gradient_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_gradient_value: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    grad_accum_steps: Positive = 1
    log_summaries: bool = False
    log_grads: bool = False
    log_hists: bool = False
    ws_summary: bool = False
    disable_standard_logs: bool = False
    # Without mixed precision nothing is scaled, so only the neutral value is taken.
    loss_scaling_factor: Literal[1] = 1
    initial_loss_scale: Rate | None = None
    steps_per_increase: Positive | None = None
    min_loss_scale: Rate | None = None
    max_loss_scale: Rate | None = None
    overflow_tolerance: Rate | None = None


class RunConfig(Section):
    """`runconfig`."""

    max_steps: Natural = 100
    steps: Natural | None = None
    eval_steps: Natural = 0
    save_checkpoints_steps: Positive = 1000
    keep_checkpoint_max: Natural = 5
    save_summary_steps: Positive = 100
    log_step_count_steps: Positive | None = None
    throttle_secs: Natural = 0
    tf_random_seed: Natural | None = None
    enable_distributed: Literal[False] = False
    multiple_workers: Literal[False] = False
    cs_ip: None = None
    checkpoint_path: str | None = None
    num_wgt_servers: Natural | None = None


class Params(Section):
    """A whole params.yaml."""

    train_input: InputParams
    eval_input: InputParams | None = None
    model: ModelParams
    optimizer: OptimizerParams
    runconfig: RunConfig = RunConfig()

    @property
    def config(self) -> GPTJConfig:
        """The model's shape and constants.

        Raises:
            ConfigError: it is not a GPT-J.
        """
        section = self.model.model_dump(exclude_unset=True)
        return config_from_model_section(
            section, vocab_size=self.train_input.vocab_size, where="params"
        )

    @property
    def log_steps(self) -> int:
        """Steps between lines of metrics."""
        return self.runconfig.log_step_count_steps or self.runconfig.save_summary_steps

    @property
    def tokens_per_byte(self) -> float:
        """What turns bits per token into bits per byte; 1 for an unknown data set."""
        return TOKENS_PER_BYTE.get((self.model.bits_per_x_dataset or "").lower(), 1.0)

    def to_yaml(self) -> str:
        """The parameters as YAML, defaults included."""
        return yaml_text(self.model_dump(mode="json", exclude_none=True))


def load_params(path: Path, settings: Mapping[str, Any] | None = None) -> Params:
    """Read and validate a params.yaml.

    Args:
        path: the file.
        settings: dotted keys that replace single values, such as `optimizer.epsilon`.

    Raises:
        ConfigError: every problem, each with its path in the YAML.
    """
    return validate(read_yaml(path), settings or {}, where=str(path))


def validate(values: dict[str, Any], settings: Mapping[str, Any], *, where: str) -> Params:
    """Check parsed parameters; see `load_params`."""
    for key, value in settings.items():
        _set(values, key.split("."), value)
    try:
        params = Params.model_validate(values)
    except ValidationError as e:
        lines = [_describe(error, values) for error in e.errors()]
        raise ConfigError("\n  ".join([f"{where}:", *dict.fromkeys(lines)])) from None
    problems = _contradictions(params)
    if problems:
        raise ConfigError("\n  ".join([f"{where}:", *problems]))
    return params


def reconcile(params: Params, config: GPTJConfig, where: Path) -> GPTJConfig:
    """The config to train: a checkpoint's, with the YAML's dropouts.

    Raises:
        ConfigError: YAML and checkpoint disagree on the architecture.
    """
    given = params.config
    problems = [
        f"{n} is {getattr(given, n)!r} in the YAML, {getattr(config, n)!r} in the checkpoint"
        for n in _ARCHITECTURE
        if getattr(given, n) != getattr(config, n)
    ]
    if problems:
        raise ConfigError(
            f"{where}: " + "; ".join(problems),
            hint="use the params.yaml that `gptj convert` wrote beside the checkpoint",
        )
    return replace(config, **{n: getattr(given, n) for n in TRAINING_FIELDS})


def _set(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {'.'.join(path)}: {key} is not a section")
    values[path[-1]] = value


def _contradictions(params: Params) -> list[str]:
    problems = []
    optimizer = params.optimizer
    if optimizer.max_gradient_norm and optimizer.max_gradient_value:
        problems.append("optimizer: max_gradient_norm and max_gradient_value are both set")
    for n, schedule in enumerate(optimizer.learning_rate):
        where = f"optimizer.learning_rate[{n}]"
        if isinstance(schedule, PiecewiseConstant):
            if len(schedule.values) != len(schedule.boundaries) + 1:
                problems.append(f"{where}: expected one value more than boundaries")
            if sorted(set(schedule.boundaries)) != schedule.boundaries:
                problems.append(f"{where}: boundaries do not rise")
        last = n == len(optimizer.learning_rate) - 1
        if not last and not isinstance(schedule, Cosine) and schedule.steps is None:
            problems.append(f"{where}: steps missing, needed by all schedules but the last")
    for name in ("train_input", "eval_input"):
        section = getattr(params, name)
        limit = params.model.max_position_embeddings
        if section and section.max_sequence_length > limit:
            problems.append(
                f"{name}.max_sequence_length is {section.max_sequence_length}, "
                f"expected at most model.max_position_embeddings ({limit})"
            )
    return problems


def _describe(error: Any, values: Any) -> str:
    """One pydantic error as a line: path, what was found, what was expected."""
    location = [part for part in error["loc"] if part not in _SCHEDULERS]
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys(location[:-1], values), n=1)
        return f"{path} is not a known key" + (f", did you mean {near[0]!r}?" if near else "")
    if error["type"] == "missing":
        return f"{path} is missing"
    return f"{path} is {str(error['input'])[:80]!r}, {_expected(error)}"


#: Schedules by name; pydantic puts the name into an error's location.
_SCHEDULERS: dict[str, type[Section]] = {
    m.__name__: m for m in (Constant, Linear, Polynomial, Cosine, Exponential, PiecewiseConstant)
}


def _expected(error: Any) -> str:
    message = error["msg"]
    return message[0].lower() + message[1:]


def _keys(location: Sequence[Any], values: Any) -> list[str]:
    """The keys that the section at this place may have."""
    if not location:
        return list(Params.model_fields)
    section: Any = {
        "train_input": InputParams,
        "eval_input": InputParams,
        "model": ModelParams,
        "optimizer": OptimizerParams,
        "runconfig": RunConfig,
    }.get(location[0])
    if section and len(location) > 1:
        for part in location:
            values = values[part]
        section = _SCHEDULERS.get(values.get("scheduler"))
    return list(section.model_fields) if section else []
