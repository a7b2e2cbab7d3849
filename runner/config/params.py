"""The sections of params.yaml as classes: one field per key, with its default and meaning.

Keys are those of the reference. A value that the reference accepts and this program does not
implement is refused by name, never ignored. `runner.config.params_file` reads and checks a file;
docs/params.md is generated from the docstrings here.
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
from runner.config.eval_metric import EvalMetric
from runner.config.execution import Backend, Execution, default_backend

#: Tokens per byte of text for each data set, used for bits per byte.
TOKENS_PER_BYTE = {"pile": 0.29335, "openwebtext2": 0.2434}

#: Seed of the shuffle when the YAML names none.
DEFAULT_SEED = 1

#: Largest float32, which no loss scale may exceed, and smallest loss scale allowed.
_FLOAT32_MAX = 3.4028234663852886e38
_SMALLEST_SCALE = 2.0**-14


class Section(BaseModel):
    """A mapping in the YAML; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _whole(value: Any) -> Any:
    """Read `1e6` and "5" as whole numbers, too."""
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
    """`train_input` and `eval_input`: where the records are, and how they are batched."""

    data_processor: Literal["GptTfRecordsProcessor"] = "GptTfRecordsProcessor"
    """Reader of the records: TFRecords with input_ids, input_mask and labels."""
    data_dir: Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
    """Folder of the records, or a list of folders, of which every file that matches `*.tfrecord*`
    is read; or an `.index` file that lists record files. A folder may be an address in object
    storage, such as s3://bucket/records."""
    vocab_size: Positive | None = None
    """Vocabulary size: rows of the embedding."""
    vocab_file: str | None = None
    """File with one token per line; its lines are counted when vocab_size is not set."""
    max_sequence_length: Positive
    """Tokens per record."""
    batch_size: Positive
    """Records per batch, over all workers."""
    shuffle: bool | None = None
    """Whether to shuffle the records; null means in training only."""
    shuffle_seed: Whole | None = None
    """Seed of the shuffle; null means 1, so that a run can resume."""
    shuffle_buffer: Positive | None = None
    """Number of records in the shuffle buffer; null means 10 batches."""
    repeat: bool | None = None
    """Whether to start again after the last record; null means in training only."""
    n_parallel_reads: Positive = 4
    """Number of files read in turn."""
    use_multiple_workers: bool = False
    """No effect: workers always share each batch, so that batch_size is global."""
    skip_steps: Natural = 0
    """Number of batches to skip at the start."""
    mixed_precision: bool = False
    """No effect. Dtype of the mask, which the reference copies here from `model`."""

    @property
    def effective_shuffle_seed(self) -> int:
        """Seed of the shuffle; fixed where none is given, because a run must be able to resume."""
        return DEFAULT_SEED if self.shuffle_seed is None else self.shuffle_seed

    @property
    def effective_shuffle_buffer(self) -> int:
        """Number of records in the shuffle buffer."""
        return self.shuffle_buffer or 10 * self.batch_size


class Initializer(Section):
    """Random values of weights that no checkpoint provides."""

    name: Literal["scaled_init_normal", "variance_scaling", "truncated_normal", "normal"]
    """Distribution: scaled_init_normal (deviation sigma / sqrt(key)), variance_scaling (variance
    scale / fan), normal or truncated_normal (deviation stddev)."""
    key: Literal["vocab_size", "num_hidden_layers"] | None = None
    """Divisor of scaled_init_normal: the vocabulary size, or twice the number of blocks."""
    mean: Number = 0.0
    """Mean of the normal distributions."""
    sigma: PositiveNumber = 1.0
    """Scale of scaled_init_normal."""
    stddev: PositiveNumber = 1.0
    """Standard deviation of normal and truncated_normal."""
    scale: PositiveNumber | None = None
    """Scale of variance_scaling, instead of scale_type."""
    scale_type: Literal["wang_init", "small_init"] | None = None
    """Named scale of variance_scaling: wang_init is 4 / layers², small_init is 2 / 5."""
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in"
    """Fan of variance_scaling."""
    distribution: Literal["truncated_normal", "normal", "untruncated_normal", "uniform"] = (
        "truncated_normal"
    )
    """Shape of the distribution of scaled_init_normal and variance_scaling; normal means
    truncated_normal, as in Keras."""


Initializers = Annotated[list[Initializer], BeforeValidator(_as_list), Field(max_length=1)]


class LoraParams(Section):
    """`model.lora`: train only an adapter. The kernels of some dense layers get alpha / rank · A ·
    B added, and nothing else changes. Not a section of the reference."""

    rank: Positive = 8
    """Rank of the update: columns of A and rows of B."""
    alpha: PositiveNumber = 16.0
    """Scale of the update, which is multiplied by alpha / rank."""
    targets: Annotated[list[DenseLayer], BeforeValidator(_as_list), Field(min_length=1)] = (
        LORA_LAYERS
    )
    """Dense layers that are adapted in every block, by their Hugging Face names: q_proj, k_proj,
    v_proj, out_proj, fc_in, fc_out."""
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which jax keeps the matrices that are not trained; bfloat16 takes half the memory
    and rounds them, also in the checkpoints."""

    @property
    def lora(self) -> Lora:
        """Return the adapter as the model describes it."""
        return Lora(rank=self.rank, alpha=self.alpha, targets=tuple(self.targets))


class ModelParams(Section):
    """`model`: the architecture, and how it computes."""

    hidden_size: Positive
    """Width of the hidden states."""
    num_heads: Positive
    """Number of attention heads."""
    num_hidden_layers: Positive = 1
    """Number of blocks."""
    filter_size: Positive | None = None
    """Width of the feed-forward layer; null means 4 × hidden_size."""
    nonlinearity: str = FIXED_MODEL_KEYS["nonlinearity"]
    """Activation of the feed-forward layer: gelu, in its tanh form."""
    rotary_dim: Whole = -1
    """Number of rotary features per head; must be set."""
    max_position_embeddings: Positive
    """Largest number of tokens in a sequence."""
    layer_norm_epsilon: PositiveNumber = 1e-8
    """Constant added to the variance in layer norms."""
    share_embedding_weights: bool = True
    """Whether the output head uses the embedding as its weight."""
    use_bias_in_output: bool = True
    """Must be true: GPT-J's head has a bias."""
    use_projection_bias_in_attention: bool = False
    """Must be false: GPT-J's projections have no bias."""
    use_ffn_bias_in_attention: bool = False
    """Must be false: GPT-J's attention output has no bias."""
    use_ffn_bias: bool = True
    """Must be true: GPT-J's feed-forward layers have a bias."""
    use_untied_layer_norm: bool = False
    """Must be false: both branches of a block read the same norm."""
    use_position_embeddings: bool = False
    """Must be false: positions are rotary."""
    embedding_dropout_rate: Fraction = 0.0
    """Dropout rate of the embeddings."""
    attention_dropout_rate: Fraction = 0.0
    """Dropout rate of the attention probabilities."""
    residual_dropout_rate: Fraction = 0.0
    """Dropout rate of the outputs of attention and feed-forward."""
    embedding_initializer: Initializers | None = None
    """Initializer of the embedding; null means truncated normal with deviation 1 /
    sqrt(vocab_size)."""
    initializer: Initializers | None = None
    """Initializer of all other matrices; null means variance scaling 1.0 of fan_in, truncated
    normal."""
    output_layer_initializer: Initializers | None = None
    """Initializer of out_proj and fc_out; null means variance scaling 4 / layers²."""
    mixed_precision: bool = False
    """Whether to compute in 16 bits; weights, optimizer slots, softmax, norms, rotary angles and
    loss stay in float32."""
    mixed_precision_dtype: Literal["float16", "bfloat16"] = "float16"
    """Dtype of mixed_precision; bfloat16 needs no loss scale. Not a key of the reference."""
    flash_attention: bool = False
    """Whether jax computes attention by cuDNN's fused kernel, which keeps no scores; needs
    mixed_precision, no attention dropout, and a GPU that has the kernel. Not a key of the
    reference."""
    recompute: bool = False
    """Whether to recompute the activations of each block in the backward pass instead of keeping
    them. Not a key of the reference."""
    lora: LoraParams | None = None
    """Adapter to train instead of the weights; null trains the weights. Not a key of the
    reference."""
    frozen: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Patterns of frozen weights: a variable whose TF name contains one is not trained. Not a key
    of the reference."""
    boundary_casting: bool = False
    """No effect: a setting of the CS compiler."""
    tf_summary: bool = False
    """No effect: a setting of the CS compiler."""
    precision_opt_level: Natural | None = None
    """No effect: a setting of the CS compiler."""
    attention_softmax_fp32: Literal[True] = True
    """Accepted for compatibility: the softmax is always computed in float32."""
    use_cache: bool = False
    """No effect in training: generation decides whether to use a cache."""
    backbone_only: Literal[False] = False
    """Must be false: without a head there is no loss."""
    dropout_seed: Natural | None = None
    """Seed of the dropout masks; null means tf_random_seed, else 0."""
    weight_initialization_seed: Whole | None = None
    """Seed of randomly initialized weights; null means tf_random_seed, else 0."""
    bits_per_x_dataset: str | None = None
    """Data set whose tokens per byte give bits per byte: pile, openwebtext2 or null."""


class _Schedule(Section):
    disable_lr_steps_reset: bool = False
    """Whether to count steps from the start of the run instead of the start of this schedule."""


class Constant(_Schedule):
    """Constant learning rate."""

    scheduler: Literal["Constant"]
    learning_rate: Rate
    steps: Positive | None = None


class Linear(_Schedule):
    """Linear change from the initial to the end rate over `steps` steps, then the end rate;
    repeated with `cycle`."""

    scheduler: Literal["Linear"]
    initial_learning_rate: Rate
    end_learning_rate: Rate
    steps: Positive
    cycle: bool = False


class Polynomial(_Schedule):
    """Polynomial change from the initial to the end rate, then the end rate; repeated with
    `cycle`."""

    scheduler: Literal["Polynomial"]
    initial_learning_rate: Rate
    end_learning_rate: Rate
    steps: Positive
    power: Number = 1.0
    cycle: bool = False


class Cosine(_Schedule):
    """Half a cosine from the initial rate to alpha · initial, then that rate."""

    scheduler: Literal["Cosine"]
    initial_learning_rate: Rate
    decay_steps: Positive
    alpha: Number = 0.0
    steps: Positive | None = None
    """Number of steps before the next schedule starts; null means decay_steps."""


class Exponential(_Schedule):
    """Exponential decay, initial · decay_rate^(t / decay_steps), in stairs or smooth."""

    scheduler: Literal["Exponential"]
    initial_learning_rate: Rate
    decay_steps: Positive
    decay_rate: Rate
    staircase: bool = False
    steps: Positive | None = None


class PiecewiseConstant(_Schedule):
    """Constant rates: values[n] up to and including step boundaries[n], the last value after all
    boundaries."""

    scheduler: Literal["PiecewiseConstant"]
    boundaries: Annotated[list[Natural], Field(min_length=1)]
    values: Annotated[list[Rate], Field(min_length=2)]
    steps: Positive | None = None


Schedule = Annotated[
    Constant | Linear | Polynomial | Cosine | Exponential | PiecewiseConstant,
    Field(discriminator="scheduler"),
]

#: Schedules by name; pydantic puts the name into the location of an error.
SCHEDULES: dict[str, type[Section]] = {
    m.__name__: m for m in (Constant, Linear, Polynomial, Cosine, Exponential, PiecewiseConstant)
}


def _as_schedules(value: Any) -> Any:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        return [{"scheduler": "Constant", "learning_rate": value}]
    return _as_list(value)


class OptimizerParams(Section):
    """`optimizer`: the update rule, the learning rate, and how gradients are treated before the
    update."""

    optimizer_type: Annotated[
        Literal["sgd", "momentum", "adam", "adamw", "rmsprop"], BeforeValidator(_lower)
    ]
    """Update rule."""
    learning_rate: Annotated[list[Schedule], BeforeValidator(_as_schedules), Field(min_length=1)]
    """Learning rate: a number, a schedule, or a list of schedules that run one after the other."""
    disable_lr_steps_reset: bool = False
    """Whether every schedule of the list counts steps from the start of the run."""
    momentum: Fraction = 0.9
    """Momentum of the momentum rule."""
    beta1: Fraction = 0.9
    """Decay of the first moment in adam and adamw."""
    beta2: Fraction = 0.999
    """Decay of the second moment in adam and adamw."""
    epsilon: Rate = EPSILON
    """Constant added to the denominator in adam and adamw; with mixed_precision 1e-5 unless it is
    set."""
    rmsprop_decay: Fraction = 0.9
    """Decay of the mean square in rmsprop."""
    rmsprop_momentum: Fraction = 0.0
    """Momentum of rmsprop."""
    weight_decay_rate: Rate = 0.0
    """Weight decay of adamw."""
    exclude_from_weight_decay: list[str] = ["LayerNorm", "layer_norm", "bias", "Bias"]
    """Patterns of variables without weight decay, matched anywhere in the TF name. Add `ln_1` to
    exclude the layer norms of blocks."""
    use_bias_correction: bool = False
    """Whether adamw corrects the bias of its moments; adam always does."""
    max_gradient_norm: Rate | None = None
    """Largest global norm of the gradients, which are scaled down to it; 0 or null means no
    limit."""
    max_gradient_value: Rate | None = None
    """Largest absolute value of a gradient, which is clipped to it; 0 or null means no limit."""
    grad_accum_steps: Positive = 1
    """Number of batches whose gradients are averaged for one update."""
    loss_scaling_factor: PositiveNumber | Literal["dynamic", "tf_dynamic"] = 1.0
    """Factor on the loss before the backward pass: a number, or a dynamic scale that adapts."""
    initial_loss_scale: PositiveNumber = 2.0**15
    """First value of a dynamic loss scale."""
    steps_per_increase: Positive = 2000
    """Number of steps after which a dynamic loss scale doubles."""
    min_loss_scale: LossScale = _SMALLEST_SCALE
    """Smallest value of a dynamic loss scale."""
    max_loss_scale: LossScale = 2.0**15
    """Largest value of a dynamic loss scale."""
    overflow_tolerance: Rate = 0.05
    """Share of overflowing steps beyond which a dynamic loss scale halves."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the optimizer slots of a streamed run on disk, and of those of jax; bfloat16 is
    rounded stochastically."""
    log_summaries: bool = True
    """Accepted for compatibility: summaries are always written."""
    log_grads: bool = False
    """No effect: gradients are not recorded; their norm is logged."""
    log_hists: bool = False
    """Whether to record histograms of the weights every save_summary_steps."""
    ws_summary: bool = False
    """No effect: a setting of the CS client."""
    disable_standard_logs: bool | None = None
    """No effect: a setting of the reference's logging."""


class EarlyStopping(Section):
    """`runconfig.early_stopping`: end a run of train_and_eval once a metric stops improving. Not a
    section of the reference."""

    metric: EvalMetric = EvalMetric.LOSS
    """Evaluation metric to watch: loss, accuracy, lm_perplexity or bits_per_byte."""
    patience: Positive
    """Number of evaluations in a row without an improvement after which the run ends."""
    min_delta: Rate = 0.0
    """Smallest change of the metric that counts as an improvement, exclusive."""


class RunConfig(Section):
    """`runconfig`: how long to train, how often to save, and on what."""

    max_steps: Natural = 100
    """Step to train up to."""
    steps: Natural | None = None
    """Number of further steps to train, whatever max_steps is."""
    eval_steps: Whole | None = 0
    """Number of batches per evaluation; 0 or null means all."""
    save_checkpoints_steps: Positive = 1000
    """Number of steps between checkpoints."""
    keep_checkpoint_max: Natural | None = 5
    """Number of newest checkpoints to keep; 0 means all."""
    keep_best: Natural = 0
    """Number of best checkpoints to keep beside the newest, by best_metric; needs train_and_eval.
    Not a key of the reference."""
    best_metric: EvalMetric = EvalMetric.LOSS
    """Evaluation metric of keep_best: loss, accuracy, lm_perplexity or bits_per_byte. Not a key of
    the reference."""
    early_stopping: EarlyStopping | None = None
    """Rule that ends a run of train_and_eval early; null means none. Not a key of the reference."""
    save_summary_steps: Positive = 100
    """Number of steps between TensorBoard summaries."""
    log_step_count_steps: Positive | None = None
    """Number of steps between lines of metrics; null means save_summary_steps."""
    throttle_secs: Natural = 0
    """Smallest number of seconds between evaluations in train_and_eval."""
    tf_random_seed: Natural | None = None
    """Seed of everything that has no seed of its own."""
    enable_distributed: bool = False
    """Whether several workers share each batch: those of TF_CONFIG, else one per GPU of this
    machine."""
    multiple_workers: bool = False
    """Whether the workers are on several machines, which TF_CONFIG must name."""
    workers: Positive = 1
    """Number of workers that train together. The run records it; `--set` resumes with another
    number. Not a key of the reference."""
    cs_ip: str | None = None
    """Address of a CS system."""
    checkpoint_path: str | None = None
    """Checkpoint whose weights alone the run starts from, at step 0 and with new optimizer
    slots."""
    execution: Execution = Execution.RESIDENT
    """Where the weights are: resident in memory, or streamed from disk one block at a time. Not a
    key of the reference."""
    backend: Backend = Field(default_factory=default_backend)
    """Library that computes: TensorFlow, the default where it is installed, or JAX, which shards a
    model across devices. Not a key of the reference."""
    mesh: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """Shape of the device mesh of jax, `[batch, model]`: numbers of devices that batches and
    tensors are divided among; null divides batches among the processes, and tensors among the
    devices of each. Not a key of the reference."""
    shard_weights: bool = False
    """Whether jax also divides weights, gradients and slots among the devices that batches are
    divided among, instead of giving each a copy (ZeRO-3). Not a key of the reference."""
    num_wgt_servers: Natural | None = None
    """No effect: a setting of the CS client."""
    disable_standard_logs: bool | None = None
    """No effect: a setting of the reference's logging."""
    disable_input_pipeline_ckpt: bool | None = None
    """No effect: a setting of the CS client; the position in the data is always saved."""
    mode: Literal["train", "eval", "eval_all", "train_and_eval"] | None = None
    """Recorded by the reference; here the command line decides."""
    model_dir: str | None = None
    """Recorded by the reference; here the command line decides."""
    params: str | None = None
    """No effect: recorded by the reference."""
    device: str | None = None
    """Device that computes, such as /gpu:0; null lets TensorFlow choose."""
    validate_only: bool = False
    """Recorded by the reference; here the command line decides."""
    compile_only: bool = False
    """Recorded by the reference; here the command line decides."""


def _without_data(value: Any) -> Any:
    """Read a section without data as absent: the reference fills an empty section with defaults and
    saves them."""
    return None if isinstance(value, dict) and "data_dir" not in value else value


class Params(Section):
    """A whole params.yaml."""

    train_input: InputParams
    """Records to train on."""
    eval_input: Annotated[InputParams | None, BeforeValidator(_without_data)] = None
    """Records to evaluate on."""
    model: ModelParams
    """Architecture of the model."""
    optimizer: OptimizerParams
    """Optimizer of the run."""
    runconfig: RunConfig = RunConfig()
    """Settings of the run."""
    csconfig: dict[str, Any] | None = None
    """No effect: a setting of the CS client."""

    @model_validator(mode="after")
    def _mixed_epsilon(self) -> Self:
        if self.model.mixed_precision and "epsilon" not in self.optimizer.model_fields_set:
            optimizer = self.optimizer.model_copy(update={"epsilon": MIXED_EPSILON})
            return self.model_copy(update={"optimizer": optimizer})
        return self

    @property
    def config(self) -> GPTJConfig:
        """Shape and constants of the model.

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
        """Keras dtype policy that the model computes with."""
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
        """Return the parameters as YAML that the reference reads too, defaults included."""
        return yaml_text(complete_for_reference(self.model_dump(mode="json", exclude_none=True)))
