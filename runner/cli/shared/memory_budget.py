"""`--memory`: how much of a streamed model stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_model.errors import UsageError
from gptj_model.streaming.residency import NOTHING_RESIDENT, Residency
from runner.cli.shared.options import SIZE
from runner.cli.shared.output import Output
from runner.config.execution import Execution

if TYPE_CHECKING:
    from gptj_convert.checkpoint.open import Checkpoint

#: The option, for commands that run a model.
memory_option = click.option(
    "--memory",
    type=SIZE,
    metavar="SIZE",
    help="Memory to use, such as 8GB: as many blocks stay in memory as fit, and the others are "
    "read when they are needed; implies --execution streaming.  [default: one block]",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Size of one forward pass."""

    batch: int
    """Number of sequences."""
    length: int
    """Tokens of the longest sequence."""
    states: int
    """Smallest number of bytes that last from block to block."""


def execution_within(budget: int | None, execution: str | None, stated: Callable[[], str]) -> str:
    """Return how the model runs: as asked for, else within the budget, else as the YAML says.

    Raises:
        UsageError: a budget is given for a model that is wholly in memory.
    """
    if budget is None:
        return execution or stated()
    if execution == Execution.RESIDENT:
        raise UsageError(
            f"--memory is of a model that is read block by block, and --execution is "
            f"{Execution.RESIDENT}",
            hint="leave one of them out: with enough --memory all blocks stay there",
        )
    return Execution.STREAMING


class MemoryBudget:
    """Decides what stays in memory, and says so.

    Args:
        output: sink of the note.
        budget: bytes that may be used; None keeps nothing beyond what computes.
    """

    def __init__(self, output: Output, budget: int | None) -> None:
        self._output = output
        self._budget = budget
        self.spare: int | None = None
        """Bytes of the budget that remain; None without a budget."""
        self.fields: dict[str, Any] = {}
        """Fields of the JSON object: what stays, and the planned memory."""

    def room(self, states: int, without_budget: int) -> int:
        """Return the bytes of hidden states that may share one reading of the weights.

        Args:
            states: bytes of hidden states that `keep` has planned for.
            without_budget: what is returned if there is no budget.
        """
        return without_budget if self.spare is None else states + self.spare

    def keep(self, checkpoint: Checkpoint, load: Load) -> Residency:
        """Return what stays in memory.

        Raises:
            UsageError: the budget is too small for one block.
        """
        if self._budget is None:
            return NOTHING_RESIDENT
        from gptj_convert.resources import footprint

        config = checkpoint.config
        memory = partial(
            footprint.streamed_memory,
            config,
            stored=checkpoint.dtype,
            batch=load.batch,
            length=load.length,
            states=load.states,
        )
        least = memory()
        if self._budget < least:
            raise UsageError(
                f"--memory is {self._budget / 1e9:.2f} GB, and with one block at a time "
                f"{least / 1e9:.2f} GB are needed for {load.batch} x {load.length} tokens",
                hint=f"--memory {-(-least // 10**7) / 100:.2f}GB, or fewer or shorter sequences",
            )
        kept = footprint.residency_within(self._budget, config, least=least)
        planned = memory(kept=kept)
        self.spare = self._budget - planned
        head = "and the head stay" if kept.head else "stay"
        self._output.note(
            f"{kept.blocks} of {config.n_layer} blocks {head} in memory: {planned / 1e9:.2f} GB "
            f"planned of {self._budget / 1e9:.2f} GB"
        )
        self.fields = {
            "kept_blocks": kept.blocks,
            "kept_head": kept.head,
            "planned_rss_bytes": planned,
        }
        return kept
