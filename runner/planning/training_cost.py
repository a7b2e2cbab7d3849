"""What a run of training will need, from its parameters and headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptj_convert.resources import footprint
from gptj_convert.resources.rates import Rates
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.errors import ConfigError
from gptj_model.tensors import EMBEDDING, SLOTS, Tensor, block
from runner.config.execution import Execution
from runner.config.params import Params, RunConfig
from runner.config.trainable import trainable_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """Sizes are in bytes."""

    execution: Execution
    memory: int
    """Peak of the process."""
    state: int
    """Of one checkpoint: weights and slots."""
    states: int
    """Number of checkpoints on the disk at once, at most: those that are kept, and one being
    written; if all are kept, those of the whole run."""
    scratch: int
    """What a step keeps on the disk while it goes on."""
    read: int
    """From the disk, each step; the hidden states, which mostly stay in memory, are left out."""
    written: int
    """To the disk, each step."""
    flops: float
    """Floating-point operations of a step, blocks that are computed again included."""
    update_read: int = 0
    """Of `read`, what is moved behind the next step's forwards."""
    update_written: int = 0
    """Of `written`, likewise."""
    awaited: float = 0.0
    """The share of that which the first block waits for."""

    @property
    def disk(self) -> int:
        """Needed in the run's folder."""
        return self.states * self.state + self.scratch

    def missing_disk(self, existing: int) -> int:
        """What of it is not taken yet, when so many checkpoints are there."""
        return max(1, self.states - existing) * self.state + self.scratch

    def seconds(self, rates: Rates) -> float:
        """Of a step: computing, and what of the disk's time is not hidden behind it.

        The first block waits for its own update and the embedding's; the others are updated while
        forwards compute, a quarter of the step's operations.
        """
        computing = self.flops / rates.multiplication
        updating = self.update_read / rates.read + self.update_written / rates.write
        forwards = max(computing / 4 + self.awaited * updating, updating)
        moving = self.read / rates.read + self.written / rates.write
        return max(computing * 3 / 4 + forwards, moving)


def waiting_gradients(
    config: GPTJConfig, params: Params, trained: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Those of `trained` whose gradients a streamed step keeps on the disk: until the norm of all
    is known, or, of an embedding that the head is tied to, until its other part is."""
    for tensor in trained:
        if tensor.hf == EMBEDDING.hf:
            waits = config.tie_word_embeddings
        else:  # those of block 0, the last ones, stay in memory
            waits = bool(params.optimizer.max_gradient_norm) and tensor.block != 0
        if waits:
            yield tensor


def slots_dtype(params: Params) -> str:
    """What the slots of a run are stored in.

    Raises:
        ConfigError: 16 bits are asked for where slots are in memory.
    """
    dtype, execution = params.optimizer.moments_dtype, params.runconfig.execution
    if dtype != "float32" and (execution != Execution.STREAMING or params.model.lora):
        having = f"runconfig.execution is {execution}"
        having += " with model.lora" if params.model.lora else ""
        raise ConfigError(
            f"optimizer.moments_dtype is {dtype}, and {having}: only slots on the disk, of "
            f"{Execution.STREAMING} without model.lora, are stored in 16 bits",
            hint="--execution streaming, or --set optimizer.moments_dtype=float32",
        )
    return dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """From where to where a run trains."""

    begin: int = 0
    """Step that it begins after."""
    end: int
    """Step that it stops after."""
    existing: int = 0
    """Number of checkpoints in its folder."""

    def checkpoints(self, runconfig: RunConfig) -> int:
        """Return how many checkpoints are on the disk at once, at most."""
        if self.end <= self.begin:
            return self.existing
        every = runconfig.save_checkpoints_steps
        made = (self.end - 1) // every - self.begin // every + 1
        # A streamed run writes a checkpoint each step, most of which the next one supersedes.
        passing = runconfig.execution == Execution.STREAMING
        kept = runconfig.keep_checkpoint_max
        whole = self.existing + made + passing
        return min(kept + 1, whole) if kept else whole


def plan_training(config: GPTJConfig, params: Params, span: Span | None = None) -> TrainingPlan:
    """Plan a run, whose parameters and weights are reconciled.

    Args:
        config: of the model.
        params: of the run.
        span: the steps to train; None: all of `max_steps`.

    Raises:
        ConfigError: see `trainable_rows` and `slots_dtype`.
    """
    section, optimizer = params.train_input, params.optimizer
    batch, length = section.batch_size, section.max_sequence_length
    tokens = batch * length * optimizer.grad_accum_steps
    rows = trainable_rows(config, params)
    trained = sum(t.size for t in rows)
    total = footprint.parameters(config)
    slot = NUMPY[slots_dtype(params)].itemsize * trained
    slots = len(SLOTS[optimizer.optimizer_type]) * slot
    # Kernels with an adapter are there merged and as they were.
    state = 4 * total + slots + (8 * trained if params.model.lora else 0)
    span = span or Span(end=params.runconfig.max_steps)
    states = span.checkpoints(params.runconfig)
    flops = tokens * footprint.token_flops(config, length, rows)
    again = flops * 4 / 3
    if params.runconfig.execution == Execution.RESIDENT:
        return TrainingPlan(
            execution=Execution.RESIDENT,
            memory=footprint.training_memory(config, batch, rows, length=length),
            state=state,
            states=states,
            scratch=0,
            read=0,
            written=0,
            flops=again if params.model.recompute else flops,
        )
    vocabulary = 4 * config.vocab_size * config.n_embd
    one_block = 4 * sum(t.size for t in block(config, 0))
    # Forwards and backwards every weight; of the embedding next to nothing, of the head all.
    passes = 2 * (4 * total - (0 if config.tie_word_embeddings else vocabulary))
    waiting = update = 0
    if not params.model.lora:  # whose model is only read
        # The head is read once for both, and the last blocks stay for the way back.
        passes -= vocabulary + min(config.n_layer, 2) * one_block
        update = state
        waiting = 4 * sum(t.size for t in waiting_gradients(config, params, rows))
    behind = bool(optimizer.max_gradient_norm)
    return TrainingPlan(
        execution=Execution.STREAMING,
        memory=footprint.streamed_training_memory(config, batch, length),
        state=state,
        states=states,
        scratch=footprint.streamed_scratch(config, tokens, waiting),
        read=passes + update + waiting,
        written=update + waiting,
        flops=again,
        update_read=behind * (update + waiting),
        update_written=behind * update,
        awaited=(vocabulary + one_block) / (4 * total),
    )
