"""What a run of training will need, from its parameters and headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from gptj_convert import capacity
from gptj_convert.rates import Rates
from gptj_model.config import GPTJConfig
from gptj_model.tensors import EMBEDDING, SLOTS
from runner.execution import Execution
from runner.params import Params
from runner.trained import trained_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """Sizes are in bytes."""

    execution: Execution
    memory: int
    """Peak of the process."""
    state: int
    """Of one checkpoint: weights and slots."""
    states: int
    """Checkpoints that are there at once, at most: those that are kept, and one being written."""
    scratch: int
    """What a step keeps on the disk while it goes on."""
    read: int
    """From the disk, each step; the hidden states, which mostly stay in memory, are left out."""
    written: int
    """To the disk, each step."""
    flops: float
    """Floating-point operations of a step, blocks that are computed again included."""

    @property
    def disk(self) -> int:
        """Needed in the run's folder."""
        return self.states * self.state + self.scratch

    def missing_disk(self, existing: int) -> int:
        """What of it is not taken yet, when so many checkpoints are there."""
        return max(1, self.states - existing) * self.state + self.scratch

    def seconds(self, rates: Rates) -> float:
        """Of a step: computing, and what of the disk's time is not hidden behind it."""
        computing = self.flops / rates.multiplication
        moving = (self.read + self.written) / rates.write
        return max(computing, moving)


def plan_training(config: GPTJConfig, params: Params) -> TrainingPlan:
    """Plan a run, whose parameters and weights are reconciled.

    Raises:
        ConfigError: see `trained_rows`.
    """
    section, optimizer = params.train_input, params.optimizer
    batch, length = section.batch_size, section.max_sequence_length
    tokens = batch * length * optimizer.grad_accum_steps
    rows = trained_rows(config, params)
    trained = sum(t.size for t in rows)
    total = capacity.parameters(config)
    slots = 4 * len(SLOTS[optimizer.optimizer_type]) * trained
    # Kernels with an adapter are there merged and as they were.
    state = 4 * total + slots + (8 * trained if params.model.lora else 0)
    keep = params.runconfig.keep_checkpoint_max or 1
    flops = tokens * capacity.token_flops(config, length, rows)
    again = flops * 4 / 3
    if params.runconfig.execution == Execution.RESIDENT:
        return TrainingPlan(
            execution=Execution.RESIDENT,
            memory=capacity.training_memory(config, batch, rows, length=length),
            state=state,
            states=keep + 1,
            scratch=0,
            read=0,
            written=0,
            flops=again if params.model.recompute else flops,
        )
    embedding = sum(t.size for t in rows if t.hf == EMBEDDING.hf)
    waiting = trained - embedding if optimizer.max_gradient_norm else 0
    if config.tie_word_embeddings:
        waiting += embedding
    # Forwards and backwards every weight, the head's twice; then weights, slots and gradients.
    vocabulary = 4 * config.vocab_size * config.n_embd
    passes = 2 * (4 * total - (0 if config.tie_word_embeddings else vocabulary))
    return TrainingPlan(
        execution=Execution.STREAMING,
        memory=capacity.streamed_training_memory(config, batch, length),
        state=state,
        states=keep + 1,
        scratch=capacity.streamed_scratch(config, tokens, waiting),
        read=passes + state + 4 * waiting,
        written=state + 4 * waiting,
        flops=again,
    )
