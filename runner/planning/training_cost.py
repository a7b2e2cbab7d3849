"""Memory, disk, traffic and operations of a training run, from its parameters and headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptj_convert.resources import footprint
from gptj_convert.resources.rates import Rates
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.errors import ConfigError
from gptj_model.tensors import EMBEDDING, SLOTS, Tensor, block
from runner.config.execution import Backend, Execution
from runner.config.flash_attention import check_flash_attention
from runner.config.params import Params, RunConfig
from runner.config.trainable import trainable_rows
from runner.data.reading.place import check_shares


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """Costs of a run. Sizes are in bytes."""

    execution: Execution
    memory: int
    """Peak memory of the process."""
    state: int
    """Size of one checkpoint: weights and slots."""
    states: int
    """Largest number of checkpoints on disk at once: those that are kept, and one being written; if
    all are kept, those of the whole run."""
    scratch: int
    """Disk space that a step needs beside the checkpoints."""
    read: int
    """Bytes read from disk per step, without the hidden states, which mostly stay in memory."""
    written: int
    """Bytes written to disk per step."""
    flops: float
    """Floating-point operations per step, including recomputed blocks."""
    update_read: int = 0
    """Part of `read` that moves during the next step's forward pass."""
    update_written: int = 0
    """Part of `written` that moves during the next step's forward pass."""
    awaited: float = 0.0
    """Share of that traffic which the first block waits for."""

    @property
    def disk(self) -> int:
        """Disk space needed in the run's folder."""
        return self.states * self.state + self.scratch

    def missing_disk(self, existing: int) -> int:
        """Return the disk space that is still needed when `existing` checkpoints exist."""
        return max(1, self.states - existing) * self.state + self.scratch

    def seconds(self, rates: Rates) -> float:
        """Return the time of a step: computing, and the disk's time that is not hidden behind it.

        The first block waits for its own update and the embedding's; the others are updated while
        the forward pass, a quarter of the step's operations, computes.
        """
        computing = self.flops / rates.multiplication
        updating = self.update_read / rates.read + self.update_written / rates.write
        forwards = max(computing / 4 + self.awaited * updating, updating)
        moving = self.read / rates.read + self.written / rates.write
        return max(computing * 3 / 4 + forwards, moving)


def waiting_gradients(
    config: GPTJConfig, params: Params, trained: Iterable[Tensor]
) -> Iterator[Tensor]:
    """Yield those of `trained` whose gradients a streamed step keeps on disk: until the norm of all
    is known or, for an embedding that the head is tied to, until its other part is."""
    for tensor in trained:
        if tensor.hf == EMBEDDING.hf:
            waits = config.tie_word_embeddings
        else:  # the last gradients, those of block 0, stay in memory
            waits = bool(params.optimizer.max_gradient_norm) and tensor.block != 0
        if waits:
            yield tensor


def slots_dtype(params: Params) -> str:
    """Return the dtype that the slots of a run are stored in.

    Raises:
        ConfigError: 16 bits are asked for where slots are in memory.
    """
    dtype, execution = params.optimizer.moments_dtype, params.runconfig.execution
    if params.runconfig.backend == Backend.JAX:
        return dtype
    if dtype != "float32" and (execution != Execution.STREAMING or params.model.lora):
        having = f"runconfig.execution is {execution}"
        having += " with model.lora" if params.model.lora else ""
        raise ConfigError(
            f"optimizer.moments_dtype is {dtype}, and {having}: only slots on the disk, of "
            f"{Execution.STREAMING} without model.lora, and those of {Backend.JAX} are stored in "
            "16 bits",
            hint=f"--execution streaming, --backend {Backend.JAX}, or "
            "--set optimizer.moments_dtype=float32",
        )
    return dtype


def check_executor(params: Params, workers: int) -> None:
    """Check that an executor exists for the parameters.

    Args:
        params: parameters of the run.
        workers: number of processes that share each batch.

    Raises:
        ConfigError: `slots_dtype` or `check_flash_attention` raises it, several workers would
            stream the weights, or they cannot share a batch.
    """
    slots_dtype(params)
    check_flash_attention(params)
    if params.runconfig.backend == Backend.JAX:
        return  # its mesh divides batches, whatever the number of processes
    if workers > 1 and params.runconfig.execution == Execution.STREAMING:
        raise ConfigError(
            f"runconfig.execution is streaming, and there are {workers} workers, expected 1",
            hint="several workers hold the whole model each: "
            "--set runconfig.execution=resident, or start one",
        )
    check_shares(params.train_input, workers)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The steps that a run trains."""

    begin: int = 0
    """Step after which it starts."""
    end: int
    """Step after which it stops."""
    existing: int = 0
    """Number of checkpoints in its folder."""

    def checkpoints(self, runconfig: RunConfig) -> int:
        """Return the largest number of checkpoints on disk at once."""
        if self.end <= self.begin:
            return self.existing
        every = runconfig.save_checkpoints_steps
        made = (self.end - 1) // every - self.begin // every + 1
        # A streamed run writes a checkpoint every step, and the next one supersedes most of them.
        passing = runconfig.execution == Execution.STREAMING
        kept = runconfig.keep_checkpoint_max
        whole = self.existing + made + passing
        return min(kept + runconfig.keep_best + 1, whole) if kept else whole


def plan_training(config: GPTJConfig, params: Params, span: Span | None = None) -> TrainingPlan:
    """Return the costs of a run whose parameters and weights are reconciled.

    Args:
        config: configuration of the model.
        params: parameters of the run.
        span: steps to train; None means all of `max_steps`.

    Raises:
        ConfigError: as `trainable_rows` and `slots_dtype` raise it.
    """
    section, optimizer = params.train_input, params.optimizer
    batch, length = section.batch_size, section.max_sequence_length
    tokens = batch * length * optimizer.grad_accum_steps
    rows = trainable_rows(config, params)
    trained = sum(t.size for t in rows)
    total = footprint.parameters(config)
    slot = NUMPY[slots_dtype(params)].itemsize * trained
    slots = len(SLOTS[optimizer.optimizer_type]) * slot
    # Adapted kernels are stored merged, and as they were.
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
    # Every weight is read in the forward and in the backward pass; of the embedding next to
    # nothing, of the head all.
    passes = 2 * (4 * total - (0 if config.tie_word_embeddings else vocabulary))
    waiting = update = 0
    if not params.model.lora:  # the model is only read
        # The head is read once for both passes, and the last blocks stay in memory for the backward
        # pass.
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
