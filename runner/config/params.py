"""The reference's params.yaml: a section a class, a key a field, with default and meaning.

What the reference accepts but this program does not do is refused by name and value, never
ignored in silence. `runner.config.params_file` reads and checks a file; docs/params.md is made from
the docstrings here.
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
from gptj_model.lora import Lora
from gptj_model.tensors import LORA_LAYERS, DenseLayer
from runner.config.execution import Backend, Execution

#: Tokens per byte of text, by data set, for bits per byte.
TOKENS_PER_BYTE = {"pile": 0.29335, "openwebtext2": 0.2434}

#: The shuffle's seed when the YAML names none.
DEFAULT_SEED = 1

#: The largest float32, which no loss scale may exceed, and the smallest scale there may be.
_FLOAT32_MAX = 3.4028234663852886e38
_SMALLEST_SCALE = 2.0**-14


class Section(BaseModel):
    """A mapping in the YAML whose unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _whole(value: Any) -> Any:
    """`1e6` and "5" are whole numbers too."""
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
    """`train_input` and `eval_input`: the records, and in what order and batches."""

    data_processor: Literal["GptTfRecordsProcessor"] = "GptTfRecordsProcessor"
    """How records are read: TFRecords of input_ids, input_mask and labels."""
    data_dir: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    """A folder, or several; every file there that matches `*.tfrecord*`."""
    vocab_size: Positive | None = None
    """Rows of the embedding."""
    vocab_file: str | None = None
    """A file with a line a token, counted when vocab_size is not set."""
    max_sequence_length: Positive
    """Tokens of a record."""
    batch_size: Positive
    """Records of a batch."""
    shuffle: bool | None = None
    """Shuffle the records; null: in training only."""
    shuffle_seed: Whole | None = None
    """Of the shuffle; null: 1, so that a run can go on."""
    shuffle_buffer: Positive | None = None
    """Records to draw from; null: 10 batches."""
    repeat: bool | None = None
    """Begin again at the end; null: in training only."""
    n_parallel_reads: Positive = 4
    """Files that are read in turns."""
    use_multiple_workers: bool = False
    """No effect: several workers always share each batch, so that batch_size is global."""
    skip_steps: Natural = 0
    """Batches to leave out at the beginning."""
    mixed_precision: bool = False
    """Of the mask; the reference notes it here from `model`. No effect."""

    @property
    def effective_shuffle_seed(self) -> int:
        """Seed of the shuffle; without one given it is fixed, for a run must be able to resume."""
        return DEFAULT_SEED if self.shuffle_seed is None else self.shuffle_seed

    @property
    def effective_shuffle_buffer(self) -> int:
        """Number of records to draw from."""
        return self.shuffle_buffer or 10 * self.batch_size


class Initializer(Section):
    """How weights begin when no checkpoint is named."""

    name: Literal["scaled_init_normal", "variance_scaling", "truncated_normal", "normal"]
    """scaled_init_normal: deviation sigma / sqrt(key); variance_scaling: variance scale / fan;
    the others: deviation stddev."""
    key: Literal["vocab_size", "num_hidden_layers"] | None = None
    """Of scaled_init_normal: the vocabulary's size, or twice the number of layers."""
    mean: Number = 0.0
    """Of the normal distributions."""
    sigma: PositiveNumber = 1.0
    """Of scaled_init_normal."""
    stddev: PositiveNumber = 1.0
    """Of normal and truncated_normal."""
    scale: PositiveNumber | None = None
    """Of variance_scaling; it or scale_type."""
    scale_type: Literal["wang_init", "small_init"] | None = None
    """wang_init: 4 / layers²; small_init: 2 / 5."""
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in"
    """Of variance_scaling."""
    distribution: Literal["truncated_normal", "normal", "uniform"] = "truncated_normal"
    """Of scaled_init_normal and variance_scaling."""


Initializers = Annotated[list[Initializer], BeforeValidator(_as_list), Field(max_length=1)]


class LoraParams(Section):
    """Only an adapter is trained: the kernels of some dense layers get alpha / rank · A · B added,
    and nothing else changes. Not a section of the reference."""

    rank: Positive = 8
    """Columns of A and rows of B."""
    alpha: PositiveNumber = 16.0
    """The update is multiplied by alpha / rank."""
    targets: Annotated[list[DenseLayer], BeforeValidator(_as_list), Field(min_length=1)] = (
        LORA_LAYERS
    )
    """Dense layers of every block, by the names of Hugging Face: q_proj, k_proj, v_proj,
    out_proj, fc_in, fc_out."""

    @property
    def lora(self) -> Lora:
        """The same in the model's words."""
        return Lora(rank=self.rank, alpha=self.alpha, targets=tuple(self.targets))


class ModelParams(Section):
    """`model`: the architecture, and how it computes."""

    hidden_size: Positive
    """Width of the hidden states."""
    num_heads: Positive
    """Attention heads."""
    num_hidden_layers: Positive = 1
    """Blocks."""
    filter_size: Positive | None = None
    """Width of the feed-forward layer; null: 4 × hidden_size."""
    nonlinearity: str = FIXED_MODEL_KEYS["nonlinearity"]
    """gelu, which is its tanh form."""
    rotary_dim: Whole = -1
    """Features of a head that rotate; must be set."""
    max_position_embeddings: Positive
    """Longest sequence."""
    layer_norm_epsilon: PositiveNumber = 1e-8
    """Added to the variance in layer norms."""
    share_embedding_weights: bool = True
    """The head multiplies by the embedding."""
    use_bias_in_output: bool = True
    """Only true: GPT-J's head has a bias."""
    use_projection_bias_in_attention: bool = False
    """Only false."""
    use_ffn_bias_in_attention: bool = False
    """Only false."""
    use_ffn_bias: bool = True
    """Only true."""
    use_untied_layer_norm: bool = False
    """Only false: both branches of a block read one norm."""
    use_position_embeddings: bool = False
    """Only false: positions are rotary."""
    embedding_dropout_rate: Fraction = 0.0
    """Dropout of embeddings."""
    attention_dropout_rate: Fraction = 0.0
    """Dropout of attention probabilities."""
    residual_dropout_rate: Fraction = 0.0
    """Dropout of what attention and feed-forward add."""
    embedding_initializer: Initializers | None = None
    """Of the embedding; null: truncated normal, deviation 1 / sqrt(vocab_size)."""
    initializer: Initializers | None = None
    """Of all other matrices; null: variance scaling 1.0 of fan_in, truncated normal."""
    output_layer_initializer: Initializers | None = None
    """Of out_proj and fc_out; null: variance scaling 4 / layers²."""
    mixed_precision: bool = False
    """Compute in 16 bits; weights, slots, softmax, norms, angles and loss stay in float32."""
    mixed_precision_dtype: Literal["float16", "bfloat16"] = "float16"
    """With mixed_precision; bfloat16 needs no loss scale. Not a key of the reference."""
    recompute: bool = False
    """Keep no activations inside a block: compute them again for the gradients. Not a key of
    the reference."""
    lora: LoraParams | None = None
    """Train an adapter only; null: all weights. Not a key of the reference."""
    frozen: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Patterns; a variable whose TF name has one is not trained. Not a key of the reference."""
    boundary_casting: bool = False
    """Of the CS compiler. No effect."""
    tf_summary: bool = False
    """Of the CS compiler. No effect."""
    precision_opt_level: Natural | None = None
    """Of the CS compiler. No effect."""
    attention_softmax_fp32: Literal[True] = True
    """The softmax is always in float32."""
    use_cache: bool = False
    """Of generation. No effect in training."""
    backbone_only: Literal[False] = False
    """Only false: without a head there is no loss."""
    dropout_seed: Natural | None = None
    """Of the dropout masks; null: tf_random_seed, else 0."""
    weight_initialization_seed: Whole | None = None
    """Of weights that begin at random; null: tf_random_seed, else 0."""
    bits_per_x_dataset: str | None = None
    """pile, openwebtext2 or null: tokens per byte, for bits per byte."""


class _Schedule(Section):
    disable_lr_steps_reset: bool = False
    """Count steps from the run's beginning, not from this member's."""


class Constant(_Schedule):
    """learning_rate, always."""

    scheduler: Literal["Constant"]
    learning_rate: Rate
    steps: Positive | None = None


class Linear(_Schedule):
    """From initial to end in so many steps, then end; or again and again with `cycle`."""

    scheduler: Literal["Linear"]
    initial_learning_rate: Rate
    end_learning_rate: Rate
    steps: Positive
    cycle: bool = False


class Polynomial(_Schedule):
    """From initial to end along a power, then end; or again and again with `cycle`."""

    scheduler: Literal["Polynomial"]
    initial_learning_rate: Rate
    end_learning_rate: Rate
    steps: Positive
    power: Number = 1.0
    cycle: bool = False


class Cosine(_Schedule):
    """Half a cosine from initial to alpha · initial, then that."""

    scheduler: Literal["Cosine"]
    initial_learning_rate: Rate
    decay_steps: Positive
    alpha: Number = 0.0
    steps: Positive | None = None
    """How long it runs before the next; null: decay_steps."""


class Exponential(_Schedule):
    """initial · decay_rate^(t / decay_steps), in stairs or not."""

    scheduler: Literal["Exponential"]
    initial_learning_rate: Rate
    decay_steps: Positive
    decay_rate: Rate
    staircase: bool = False
    steps: Positive | None = None


class PiecewiseConstant(_Schedule):
    """values[n] up to and including boundaries[n]; the last value after them all."""

    scheduler: Literal["PiecewiseConstant"]
    boundaries: Annotated[list[Natural], Field(min_length=1)]
    values: Annotated[list[Rate], Field(min_length=2)]
    steps: Positive | None = None


Schedule = Annotated[
    Constant | Linear | Polynomial | Cosine | Exponential | PiecewiseConstant,
    Field(discriminator="scheduler"),
]

#: Schedules by name; pydantic puts the name into an error's location.
SCHEDULES: dict[str, type[Section]] = {
    m.__name__: m for m in (Constant, Linear, Polynomial, Cosine, Exponential, PiecewiseConstant)
}


def _as_schedules(value: Any) -> Any:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return [{"scheduler": "Constant", "learning_rate": value}]
    return _as_list(value)


class OptimizerParams(Section):
    """`optimizer`: the update, its rate, and what is done to gradients before it."""

    optimizer_type: Annotated[
        Literal["sgd", "momentum", "adam", "adamw", "rmsprop"], BeforeValidator(_lower)
    ]
    """The rule of the update."""
    learning_rate: Annotated[list[Schedule], BeforeValidator(_as_schedules), Field(min_length=1)]
    """A number, a schedule, or schedules that run one after the other."""
    disable_lr_steps_reset: bool = False
    """No schedule of the list counts from its own beginning."""
    momentum: Fraction = 0.9
    """Of momentum."""
    beta1: Fraction = 0.9
    """Of adam and adamw: decay of the mean gradient."""
    beta2: Fraction = 0.999
    """Of adam and adamw: decay of the mean square."""
    epsilon: Rate = EPSILON
    """Of adam and adamw; with mixed_precision 1e-5 unless it is set."""
    rmsprop_decay: Fraction = 0.9
    """Of rmsprop: decay of the mean square."""
    rmsprop_momentum: Fraction = 0.0
    """Of rmsprop."""
    weight_decay_rate: Rate = 0.0
    """Of adamw."""
    exclude_from_weight_decay: list[str] = ["LayerNorm", "layer_norm", "bias", "Bias"]
    """Patterns; a variable whose TF name has one is not decayed. Add `ln_1` to spare the norms."""
    use_bias_correction: bool = False
    """Of adamw; adam always corrects."""
    max_gradient_norm: Rate | None = None
    """Gradients are scaled down to this global norm; 0 or null: not."""
    max_gradient_value: Rate | None = None
    """Each gradient is cut to ± this; 0 or null: not."""
    grad_accum_steps: Positive = 1
    """Batches whose gradients are averaged for one update."""
    loss_scaling_factor: PositiveNumber | Literal["dynamic", "tf_dynamic"] = 1.0
    """The loss is multiplied by it for the gradients; dynamic adapts it."""
    initial_loss_scale: PositiveNumber = 2.0**15
    """Of the dynamic ones: the first."""
    steps_per_increase: Positive = 2000
    """Of the dynamic ones: steps until it doubles."""
    min_loss_scale: LossScale = _SMALLEST_SCALE
    """Of dynamic."""
    max_loss_scale: LossScale = 2.0**15
    """Of dynamic."""
    overflow_tolerance: Rate = 0.05
    """Of dynamic: the share of steps with overflow beyond which it halves."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of all slots of a streamed run, on the disk; bfloat16 is rounded stochastically."""
    log_summaries: bool = True
    """Summaries are always written."""
    log_grads: bool = False
    """No effect: gradients are not kept; the norm is logged."""
    log_hists: bool = False
    """Histograms of the weights, every save_summary_steps."""
    ws_summary: bool = False
    """Of the CS client. No effect."""
    disable_standard_logs: bool | None = None
    """Of the reference's logging. No effect."""


class RunConfig(Section):
    """`runconfig`: how far, how often, and where."""

    max_steps: Natural = 100
    """Train up to this step."""
    steps: Natural | None = None
    """Train so many steps more, whatever max_steps is."""
    eval_steps: Whole | None = 0
    """Batches of an evaluation; 0 or null: all."""
    save_checkpoints_steps: Positive = 1000
    """Steps between checkpoints."""
    keep_checkpoint_max: Natural | None = 5
    """Newest checkpoints to keep; 0: all."""
    save_summary_steps: Positive = 100
    """Steps between TensorBoard summaries."""
    log_step_count_steps: Positive | None = None
    """Steps between lines of metrics; null: save_summary_steps."""
    throttle_secs: Natural = 0
    """In train_and_eval, seconds between evaluations at least."""
    tf_random_seed: Natural | None = None
    """The seed of what has none of its own."""
    enable_distributed: bool = False
    """Several workers share each batch: those of TF_CONFIG, else one a GPU of this machine."""
    multiple_workers: bool = False
    """They are on several machines: TF_CONFIG must say which."""
    workers: Positive = 1
    """How many train together; a run writes it, and with `--set` goes on with another number. Not
    a key of the reference."""
    cs_ip: str | None = None
    """Address of a CS system."""
    checkpoint_path: str | None = None
    """Weights to begin with; the step and the slots begin anew."""
    execution: Execution = Execution.RESIDENT
    """Where the weights are: in memory, or on the disk, brought one block at a time. Not a key of
    the reference."""
    backend: Backend = Backend.TENSORFLOW
    """What computes: TensorFlow, or JAX, which divides a model among devices. Not a key of the
    reference."""
    mesh: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """Of jax, `[batch, model]`: along how many devices batches and tensors are divided; null:
    tensors along all. Not a key of the reference."""
    num_wgt_servers: Natural | None = None
    """Of the CS client. No effect."""
    disable_standard_logs: bool | None = None
    """Of the reference's logging. No effect."""
    disable_input_pipeline_ckpt: bool | None = None
    """Of the CS client: the data's position is always kept."""
    mode: Literal["train", "eval", "eval_all", "train_and_eval"] | None = None
    """As the reference saves it; the command line says it."""
    model_dir: str | None = None
    """As the reference saves it; the command line says it."""
    params: str | None = None
    """As the reference saves it. No effect."""
    device: str | None = None
    """Where to compute, such as /gpu:0; null: TensorFlow chooses."""
    validate_only: bool = False
    """As the reference saves it; the command line says it."""
    compile_only: bool = False
    """As the reference saves it; the command line says it."""


def _without_data(value: Any) -> Any:
    """The reference fills an empty section with defaults, and saves that."""
    return None if isinstance(value, dict) and "data_dir" not in value else value


class Params(Section):
    """A whole params.yaml."""

    train_input: InputParams
    """Records to train on."""
    eval_input: Annotated[InputParams | None, BeforeValidator(_without_data)] = None
    """Records to evaluate on."""
    model: ModelParams
    """The model."""
    optimizer: OptimizerParams
    """The update."""
    runconfig: RunConfig = RunConfig()
    """The run."""
    csconfig: dict[str, Any] | None = None
    """Of the CS client. No effect."""

    @model_validator(mode="after")
    def _mixed_epsilon(self) -> Self:
        if self.model.mixed_precision and "epsilon" not in self.optimizer.model_fields_set:
            optimizer = self.optimizer.model_copy(update={"epsilon": MIXED_EPSILON})
            return self.model_copy(update={"optimizer": optimizer})
        return self

    @property
    def config(self) -> GPTJConfig:
        """The model's shape and constants.

        Raises:
            ConfigError: it is not a GPT-J.
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
        """Keras' name of how the model computes."""
        model = self.model
        return f"mixed_{model.mixed_precision_dtype}" if model.mixed_precision else "float32"

    @property
    def log_steps(self) -> int:
        """Steps between lines of metrics."""
        return self.runconfig.log_step_count_steps or self.runconfig.save_summary_steps

    @property
    def eval_limit(self) -> int:
        """Batches of an evaluation; 0 means all."""
        return max(self.runconfig.eval_steps or 0, 0)

    @property
    def tokens_per_byte(self) -> float:
        """What turns bits per token into bits per byte; 1 for an unknown data set."""
        return TOKENS_PER_BYTE.get((self.model.bits_per_x_dataset or "").lower(), 1.0)

    def to_yaml(self) -> str:
        """Return the parameters as YAML, defaults included, which the reference reads too."""
        return yaml_text(complete_for_reference(self.model_dump(mode="json", exclude_none=True)))
