"""Fields of the reference's params.yaml: one class per section, one field per key.

A value that the reference accepts but this program does not support is an error that names key and
value; nothing is silently ignored. `runner.config.params_file` reads and checks a file.
`docs/params.md` is generated from the docstrings of this module.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gptj_convert.settings.params_yaml import (
    EPSILON,
    FIXED_MODEL_KEYS,
    MIXED_EPSILON,
    complete_for_reference,
    config_from_model_section,
    yaml_text,
)
from gptj_model.config import GPTJConfig
from gptj_model.lora import Lora, Target
from runner.config.execution import Backend, Execution

#: Tokens per byte of text by data set, for bits per byte.
TOKENS_PER_BYTE = {"pile": 0.29335, "openwebtext2": 0.2434}

#: Seed of the shuffle if the YAML sets none.
DEFAULT_SEED = 1

#: Largest float32, which is the upper bound of a loss scale, and its lower bound.
_FLOAT32_MAX = 3.4028234663852886e38
_SMALLEST_SCALE = 2.0**-14


class Section(BaseModel):
    """A section of the YAML, in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _whole(value: Any) -> Any:
    """Convert integral floats such as `1e6`, and strings of digits, to integers."""
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Positive = Annotated[int, BeforeValidator(_whole), Field(gt=0, strict=True)]
Natural = Annotated[int, BeforeValidator(_whole), Field(ge=0, strict=True)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Number = Annotated[float, Field(allow_inf_nan=False)]
LossScale = Annotated[float, Field(ge=_SMALLEST_SCALE, le=_FLOAT32_MAX, allow_inf_nan=False)]


class InputParams(Section):
    """Records, their order and their batches."""

    data_processor: Literal["GptTfRecordsProcessor"] = "GptTfRecordsProcessor"
    """Reader of the records. The only one reads TFRecords of input_ids, input_mask and labels."""
    data_dir: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    """Folder of records, or a list of folders; reads every file that matches `*.tfrecord*`."""
    vocab_size: Positive | None = None
    """Size of the vocabulary, which is the number of rows of the embedding."""
    vocab_file: str | None = None
    """File with one token per line; its number of lines is the vocabulary size if `vocab_size` is
    not set."""
    max_sequence_length: Positive
    """Number of tokens per record."""
    batch_size: Positive
    """Number of records per batch, over all workers."""
    shuffle: bool | None = None
    """Shuffle the records; null shuffles in training only."""
    shuffle_seed: Whole | None = None
    """Seed of the shuffle; null means 1, so that a run can resume."""
    shuffle_buffer: Positive | None = None
    """Size of the shuffle buffer in records; null means 10 batches."""
    repeat: bool | None = None
    """Start over at the end of the records; null repeats in training only."""
    n_parallel_reads: Positive = 4
    """Number of files whose records are interleaved."""
    use_multiple_workers: bool = False
    """No effect: workers always divide each batch among them, so that batch_size is global."""
    skip_steps: Natural = 0
    """Number of batches to skip at the beginning."""
    mixed_precision: bool = False
    """No effect; the reference copies the key from `model`."""

    @property
    def effective_shuffle_seed(self) -> int:
        """Seed of the shuffle, which is fixed by default so that a run can resume."""
        return DEFAULT_SEED if self.shuffle_seed is None else self.shuffle_seed

    @property
    def effective_shuffle_buffer(self) -> int:
        """Size of the shuffle buffer in records."""
        return self.shuffle_buffer or 10 * self.batch_size


class Initializer(Section):
    """Distribution of the initial weights, used without a checkpoint."""

    name: Literal["scaled_init_normal", "variance_scaling", "truncated_normal", "normal"]
    """Kind of initializer: scaled_init_normal has the standard deviation sigma / sqrt(key),
    variance_scaling the variance scale / fan, the others the standard deviation stddev."""
    key: Literal["vocab_size", "num_hidden_layers"] | None = None
    """Divisor of scaled_init_normal: the vocabulary size, or twice the number of layers."""
    mean: Number = 0.0
    """Mean of the normal distributions."""
    sigma: PositiveNumber = 1.0
    """Factor of the standard deviation of scaled_init_normal."""
    stddev: PositiveNumber = 1.0
    """Standard deviation of normal and truncated_normal."""
    scale: PositiveNumber | None = None
    """Factor of the variance of variance_scaling; an alternative to scale_type."""
    scale_type: Literal["wang_init", "small_init"] | None = None
    """Named scale of variance_scaling: wang_init is 4 / layers², small_init is 2 / 5."""
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in"
    """Fan of variance_scaling."""
    distribution: Literal["truncated_normal", "normal", "uniform"] = "truncated_normal"
    """Distribution of scaled_init_normal and variance_scaling."""


Initializers = Annotated[list[Initializer], BeforeValidator(_as_list), Field(max_length=1)]


class LoraParams(Section):
    """Low-rank adapter (LoRA) to train instead of the model: alpha / rank · A · B is added to the
    kernels of some dense layers, and nothing else changes. Not a section of the reference."""

    rank: Positive = 8
    """Number of columns of A and of rows of B."""
    alpha: PositiveNumber = 16.0
    """Numerator of the factor of A · B, alpha / rank."""
    targets: Annotated[list[Target], BeforeValidator(_as_list), Field(min_length=1)] = [
        "q_proj",
        "v_proj",
    ]
    """Dense layers of every block that get an adapter, by their Hugging Face names: q_proj, k_proj,
    v_proj, out_proj, fc_in, fc_out."""

    @property
    def lora(self) -> Lora:
        """The section as the model's own type."""
        return Lora(rank=self.rank, alpha=self.alpha, targets=tuple(self.targets))


class ModelParams(Section):
    """Architecture of the model, numeric precision, and choice of weights to train."""

    hidden_size: Positive
    """Width of the hidden states."""
    num_heads: Positive
    """Number of attention heads."""
    num_hidden_layers: Positive = 1
    """Number of transformer blocks."""
    filter_size: Positive | None = None
    """Width of the feed-forward layer; null means 4 × hidden_size."""
    nonlinearity: str = FIXED_MODEL_KEYS["nonlinearity"]
    """Activation function; only gelu, in its tanh approximation."""
    rotary_dim: Whole = -1
    """Number of features per head that are rotated; must be set."""
    max_position_embeddings: Positive
    """Largest number of tokens in a sequence."""
    layer_norm_epsilon: PositiveNumber = 1e-8
    """Constant added to the variance in layer norms."""
    share_embedding_weights: bool = True
    """Use the embedding as the kernel of the head."""
    use_bias_in_output: bool = True
    """Bias of the head; only true, because GPT-J's head has one."""
    use_projection_bias_in_attention: bool = False
    """Bias of the query, key and value projections; only false."""
    use_ffn_bias_in_attention: bool = False
    """Bias of the output projection of attention; only false."""
    use_ffn_bias: bool = True
    """Bias of the feed-forward layers; only true."""
    use_untied_layer_norm: bool = False
    """Separate norms for attention and feed-forward; only false, because they share one."""
    use_position_embeddings: bool = False
    """Learned position embeddings; only false, because GPT-J's positions are rotary."""
    embedding_dropout_rate: Fraction = 0.0
    """Dropout rate of the embeddings."""
    attention_dropout_rate: Fraction = 0.0
    """Dropout rate of the attention probabilities."""
    residual_dropout_rate: Fraction = 0.0
    """Dropout rate of the outputs of attention and feed-forward."""
    embedding_initializer: Initializers | None = None
    """Initializer of the embedding; null means truncated normal with the standard deviation
    1 / sqrt(vocab_size)."""
    initializer: Initializers | None = None
    """Initializer of all other matrices; null means variance scaling of fan_in with scale 1.0 and
    truncated normal."""
    output_layer_initializer: Initializers | None = None
    """Initializer of out_proj and fc_out; null means variance scaling with 4 / layers²."""
    mixed_precision: bool = False
    """Compute in 16 bits; weights, optimizer slots, softmax, norms, rotary angles and loss stay in
    float32."""
    mixed_precision_dtype: Literal["float16", "bfloat16"] = "float16"
    """Dtype of mixed_precision; bfloat16 needs no loss scale. Not a key of the reference."""
    recompute: bool = False
    """Recompute the activations of a block for the gradients instead of keeping them. Not a key of
    the reference."""
    lora: LoraParams | None = None
    """LoRA adapter to train; null trains the weights themselves. Not a key of the reference."""
    frozen: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Regular expressions; a variable whose TensorFlow name contains a match is not trained. Not a
    key of the reference."""
    boundary_casting: bool = False
    """Option of the CS compiler. No effect."""
    tf_summary: bool = False
    """Option of the CS compiler. No effect."""
    precision_opt_level: Natural | None = None
    """Option of the CS compiler. No effect."""
    attention_softmax_fp32: Literal[True] = True
    """Compute the softmax of attention in float32; only true."""
    use_cache: bool = False
    """Use a cache in generation. No effect in training."""
    backbone_only: Literal[False] = False
    """Omit the head; only false, because the loss needs it."""
    dropout_seed: Natural | None = None
    """Seed of the dropout masks; null means tf_random_seed, or else 0."""
    weight_initialization_seed: Whole | None = None
    """Seed of random initial weights; null means tf_random_seed, or else 0."""
    bits_per_x_dataset: str | None = None
    """Data set whose tokens per byte convert the loss to bits per byte: pile, openwebtext2, or null
    for 1 token per byte."""


class _Schedule(Section):
    disable_lr_steps_reset: bool = False
    """Count steps from the beginning of the run instead of the beginning of this schedule."""


class Constant(_Schedule):
    """learning_rate at every step."""

    scheduler: Literal["Constant"]
    learning_rate: Rate
    steps: Positive | None = None


class Linear(_Schedule):
    """Linear from initial to end over `steps`, then constant at end; repeated with `cycle`."""

    scheduler: Literal["Linear"]
    initial_learning_rate: Rate
    end_learning_rate: Rate
    steps: Positive
    cycle: bool = False


class Polynomial(_Schedule):
    """Polynomial from initial to end over `steps`, then constant at end; repeated with `cycle`."""

    scheduler: Literal["Polynomial"]
    initial_learning_rate: Rate
    end_learning_rate: Rate
    steps: Positive
    power: Number = 1.0
    cycle: bool = False


class Cosine(_Schedule):
    """Half a cosine from initial to alpha · initial, then constant."""

    scheduler: Literal["Cosine"]
    initial_learning_rate: Rate
    decay_steps: Positive
    alpha: Number = 0.0
    steps: Positive | None = None
    """Number of steps until the next schedule; null means decay_steps."""


class Exponential(_Schedule):
    """initial · decay_rate^(t / decay_steps); with `staircase` the exponent is rounded down."""

    scheduler: Literal["Exponential"]
    initial_learning_rate: Rate
    decay_steps: Positive
    decay_rate: Rate
    staircase: bool = False
    steps: Positive | None = None


class PiecewiseConstant(_Schedule):
    """values[n] up to and including step boundaries[n]; the last value after all boundaries."""

    scheduler: Literal["PiecewiseConstant"]
    boundaries: Annotated[list[Natural], Field(min_length=1)]
    values: Annotated[list[Rate], Field(min_length=2)]
    steps: Positive | None = None


Schedule = Annotated[
    Constant | Linear | Polynomial | Cosine | Exponential | PiecewiseConstant,
    Field(discriminator="scheduler"),
]

#: Schedules by name; pydantic includes the name in the location of an error.
SCHEDULES: dict[str, type[Section]] = {
    m.__name__: m for m in (Constant, Linear, Polynomial, Cosine, Exponential, PiecewiseConstant)
}


def _as_schedules(value: Any) -> Any:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return [{"scheduler": "Constant", "learning_rate": value}]
    return _as_list(value)


class OptimizerParams(Section):
    """Update rule, learning rate, and treatment of the gradients."""

    optimizer_type: Annotated[
        Literal["sgd", "momentum", "adam", "adamw", "rmsprop"], BeforeValidator(_lower)
    ]
    """Update rule."""
    learning_rate: Annotated[list[Schedule], BeforeValidator(_as_schedules), Field(min_length=1)]
    """A number, a schedule, or a list of schedules that run one after another."""
    disable_lr_steps_reset: bool = False
    """Let all schedules of the list count steps from the beginning of the run."""
    momentum: Fraction = 0.9
    """Momentum of the momentum optimizer."""
    beta1: Fraction = 0.9
    """Decay of the mean gradient of adam and adamw."""
    beta2: Fraction = 0.999
    """Decay of the mean squared gradient of adam and adamw."""
    epsilon: Rate = EPSILON
    """Epsilon of adam and adamw; with mixed_precision the default is 1e-5."""
    rmsprop_decay: Fraction = 0.9
    """Decay of the mean squared gradient of rmsprop."""
    rmsprop_momentum: Fraction = 0.0
    """Momentum of rmsprop."""
    weight_decay_rate: Rate = 0.0
    """Weight decay of adamw."""
    exclude_from_weight_decay: list[str] = ["LayerNorm", "layer_norm", "bias", "Bias"]
    """Regular expressions; a variable whose TensorFlow name contains a match is not decayed. Add
    `ln_1` to exclude the norms."""
    use_bias_correction: bool = False
    """Correct the bias of the moments of adamw; adam always does."""
    max_gradient_norm: Rate | None = None
    """Global norm that larger gradients are scaled down to; 0 or null disables it."""
    max_gradient_value: Rate | None = None
    """Absolute value that gradient elements are clipped to; 0 or null disables it."""
    grad_accum_steps: Positive = 1
    """Number of batches whose gradients are averaged for one update."""
    loss_scaling_factor: PositiveNumber | Literal["dynamic", "tf_dynamic"] = 1.0
    """Factor of the loss for the backward pass; `dynamic` and `tf_dynamic` adapt it."""
    initial_loss_scale: PositiveNumber = 2.0**15
    """Initial factor of `dynamic` and `tf_dynamic`."""
    steps_per_increase: Positive = 2000
    """Number of steps until `dynamic` and `tf_dynamic` double the factor."""
    min_loss_scale: LossScale = _SMALLEST_SCALE
    """Smallest factor of `dynamic`."""
    max_loss_scale: LossScale = 2.0**15
    """Largest factor of `dynamic`."""
    overflow_tolerance: Rate = 0.05
    """Share of steps with overflow beyond which `dynamic` halves the factor."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of a streamed run's optimizer slots on disk; bfloat16 is rounded stochastically."""
    log_summaries: bool = True
    """No effect: summaries are always written."""
    log_grads: bool = False
    """No effect: only the norm of the gradients is logged."""
    log_hists: bool = False
    """Write histograms of the weights every save_summary_steps."""
    ws_summary: bool = False
    """Option of the CS client. No effect."""
    disable_standard_logs: bool | None = None
    """Option of the reference's logging. No effect."""


class RunConfig(Section):
    """Length of the run, intervals of saving and logging, and devices."""

    max_steps: Natural = 100
    """Step to train up to."""
    steps: Natural | None = None
    """Number of further steps to train, regardless of max_steps."""
    eval_steps: Whole | None = 0
    """Number of batches per evaluation; 0 or null means all."""
    save_checkpoints_steps: Positive = 1000
    """Number of steps between checkpoints."""
    keep_checkpoint_max: Natural | None = 5
    """Number of most recent checkpoints to keep; 0 or null keeps all."""
    save_summary_steps: Positive = 100
    """Number of steps between TensorBoard summaries."""
    log_step_count_steps: Positive | None = None
    """Number of steps between lines of metrics; null means save_summary_steps."""
    throttle_secs: Natural = 0
    """Smallest interval between the evaluations of train_and_eval, in seconds."""
    tf_random_seed: Natural | None = None
    """Default of dropout_seed and weight_initialization_seed."""
    enable_distributed: bool = False
    """Divide each batch among the workers of TF_CONFIG, or else one worker per GPU of this
    machine."""
    multiple_workers: bool = False
    """Use workers on several machines, which TF_CONFIG must list."""
    workers: Positive = 1
    """Number of workers. A run records it; `--set` resumes the run with another number. Not a key
    of the reference."""
    cs_ip: str | None = None
    """Address of the CS system."""
    checkpoint_path: str | None = None
    """Checkpoint of the initial weights; the step and the optimizer slots start at zero."""
    execution: Execution = Execution.RESIDENT
    """Where the weights are kept: resident in memory, or streaming from disk one block at a time.
    Not a key of the reference."""
    backend: Backend = Backend.TENSORFLOW
    """Backend that computes: TensorFlow, or JAX, which can divide a model among devices. Not a key
    of the reference."""
    mesh: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """Numbers of devices `[batch, model]` among which JAX divides batches and tensors; null divides
    tensors among all devices. Not a key of the reference."""
    num_wgt_servers: Natural | None = None
    """Option of the CS client. No effect."""
    disable_standard_logs: bool | None = None
    """Option of the reference's logging. No effect."""
    disable_input_pipeline_ckpt: bool | None = None
    """Option of the CS client. No effect: the position in the data is always saved."""
    mode: Literal["train", "eval", "eval_all", "train_and_eval"] | None = None
    """No effect: the reference saves it here; use the option --mode."""
    model_dir: str | None = None
    """No effect: the reference saves it here; use the option --model-dir."""
    params: str | None = None
    """No effect: the reference saves it here; use the option --params."""
    device: str | None = None
    """Device that computes, such as /gpu:0; null lets TensorFlow choose."""
    validate_only: bool = False
    """No effect: the reference saves it here; use the option --validate-only."""
    compile_only: bool = False
    """No effect: the reference saves it here; use the option --compile-only."""


def _without_data(value: Any) -> Any:
    """Drop a section without data_dir: the reference saves an empty section with defaults."""
    return None if isinstance(value, dict) and "data_dir" not in value else value


class Params(Section):
    """All sections of a params.yaml."""

    train_input: InputParams
    """Records to train on."""
    eval_input: Annotated[InputParams | None, BeforeValidator(_without_data)] = None
    """Records to evaluate on, if any."""
    model: ModelParams
    """Architecture, precision and trainable weights."""
    optimizer: OptimizerParams
    """Update rule and learning rate."""
    runconfig: RunConfig = RunConfig()
    """Length, intervals and devices of the run."""
    csconfig: dict[str, Any] | None = None
    """Option of the CS client. No effect."""

    @model_validator(mode="after")
    def _mixed_epsilon(self) -> Self:
        if self.model.mixed_precision and "epsilon" not in self.optimizer.model_fields_set:
            optimizer = self.optimizer.model_copy(update={"epsilon": MIXED_EPSILON})
            return self.model_copy(update={"optimizer": optimizer})
        return self

    @property
    def config(self) -> GPTJConfig:
        """Configuration of the model.

        Raises:
            ConfigError: the section does not describe a GPT-J.
        """
        section = self.model.model_dump(exclude_unset=True)
        return config_from_model_section(section, vocab_size=self._vocab_size, where="params")

    @property
    def _vocab_size(self) -> int | None:
        inputs = self.train_input
        if inputs.vocab_size is None and inputs.vocab_file:
            return len(Path(inputs.vocab_file).read_text(encoding="utf-8").splitlines())
        return inputs.vocab_size

    @property
    def dtype_policy(self) -> str:
        """Name of the Keras dtype policy."""
        model = self.model
        return f"mixed_{model.mixed_precision_dtype}" if model.mixed_precision else "float32"

    @property
    def log_steps(self) -> int:
        """Number of steps between lines of metrics."""
        return self.runconfig.log_step_count_steps or self.runconfig.save_summary_steps

    @property
    def eval_limit(self) -> int:
        """Number of batches per evaluation; 0 means all."""
        return max(self.runconfig.eval_steps or 0, 0)

    @property
    def tokens_per_byte(self) -> float:
        """Factor from bits per token to bits per byte; 1 for an unknown data set."""
        return TOKENS_PER_BYTE.get((self.model.bits_per_x_dataset or "").lower(), 1.0)

    def to_yaml(self) -> str:
        """Return the parameters, including defaults, as YAML that the reference reads too."""
        return yaml_text(complete_for_reference(self.model_dump(mode="json", exclude_none=True)))
