"""The compiled stages of a streamed run, which the next run of the same shape may take over."""

from __future__ import annotations

from gptj_model.config import GPTJConfig
from gptj_model.streaming.training import StreamedTraining
from runner.config.params import Params
from runner.evaluation.reuse import Borrowed, borrow


def borrow_passes(
    config: GPTJConfig, params: Params, *, head_rows: bool
) -> Borrowed[StreamedTraining]:
    """Return the stages of a run, before its weights are loaded; see `borrow`.

    Args:
        config: configuration of the model.
        params: parameters of the run.
        head_rows: see `StreamedTraining`.
    """
    dtype, accumulate = params.dtype_policy, params.optimizer.grad_accum_steps
    lora = params.model.lora.lora if params.model.lora else None
    return borrow(
        (StreamedTraining, config, dtype, accumulate, lora, head_rows),
        lambda: StreamedTraining(
            config, dtype=dtype, accumulate=accumulate, lora=lora, head_rows=head_rows
        ),
        StreamedTraining.reset,
    )
