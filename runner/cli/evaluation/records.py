"""`gptj eval` on records: the model loaded or streamed, and its metrics printed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli.shared.fetching import with_local_records
from runner.cli.shared.memory_budget import Load, MemoryBudget
from runner.cli.shared.output import Output
from runner.cli.shared.progress import progress
from runner.config.execution import Backend, Execution

if TYPE_CHECKING:
    from gptj_convert.checkpoint.open import Checkpoint
    from gptj_model.config import GPTJConfig
    from runner.config.params import Params
    from runner.evaluation.evaluate import Evaluator


def evaluate_model(
    output: Output,
    model: Path,
    params: Params,
    budget: MemoryBudget | None = None,
    *,
    step: int | None = None,
) -> dict[str, float]:
    """Load a model, evaluate it, print the metrics line, and return the metrics.

    Args:
        output: where the line is printed.
        model: checkpoint of any format.
        params: parameters whose eval_input names the records.
        budget: memory of a streamed model; None means one block.
        step: step of a run's checkpoint, which the line then states.
    """
    from gptj_convert.checkpoint.open import open_checkpoint
    from runner.config.params_file import reconcile
    from runner.evaluation.evaluate import evaluate as run
    from runner.training.train import evaluation_batches

    params = with_local_records(output, params, "eval_input")
    with (
        open_checkpoint(model) as checkpoint,
        ExitStack() as lent,
        progress(output, "evaluating", in_bytes=False) as report,
    ):
        config = reconcile(params, checkpoint.config, model)
        batches = evaluation_batches(params, config.vocab_size)
        section = params.eval_input
        assert section, "there are batches of it"
        if params.runconfig.execution == Execution.STREAMING:
            size = section.batch_size, section.max_sequence_length
            evaluator = streamed_evaluator(checkpoint, budget or MemoryBudget(output, None), *size)
        else:
            evaluator = resident_evaluator(checkpoint, config, lent, params)
        metrics = run(
            evaluator,
            batches,
            tokens_per_byte=params.tokens_per_byte,
            limit=params.eval_limit,
            report=lambda n: report(n, params.eval_limit or n, "batches"),
        )
    output.data(metrics_line(metrics | ({} if step is None else {"global_step": step})))
    return metrics


def resident_evaluator(
    checkpoint: Checkpoint, config: GPTJConfig, lent: ExitStack, params: Params | None = None
) -> Evaluator:
    """Return the evaluator of a checkpoint that is loaded whole, with the settings of `config`.

    Args:
        checkpoint: open checkpoint.
        config: its configuration, maybe with other dropout rates.
        lent: takes back the model; see `loaded`.
        params: parameters that name the mesh of JAX; None means one device.
    """
    import keras

    if keras.backend.backend() == Backend.JAX:
        from runner.evaluation.sharded import checkpoint_evaluator

        return checkpoint_evaluator(checkpoint, config, params)
    from runner.evaluation.compiled import ResidentEvaluator
    from runner.evaluation.restore import loaded

    return ResidentEvaluator(loaded(checkpoint, config, lent=lent))


def streamed_evaluator(
    checkpoint: Checkpoint, budget: MemoryBudget, batch: int, length: int
) -> Evaluator:
    """Return the evaluator of a checkpoint that is read block by block.

    Args:
        checkpoint: open checkpoint; it must stay open while the evaluator is used.
        budget: memory that the model may take; what is left lets more batches share one reading.
        batch: number of sequences per forward pass.
        length: tokens per sequence.
    """
    from gptj_convert.conversion.plan import match
    from gptj_model.streaming.forward import StreamedModel
    from runner.evaluation.evaluate import STATES, StreamedEvaluator

    match(checkpoint)
    config = checkpoint.config
    states = 4 * batch * length * config.n_embd
    kept = budget.keep(checkpoint, Load(batch=batch, length=length, states=states))
    model = StreamedModel(config, checkpoint.source, checkpoint.scheme, kept=kept)
    # The rest of the budget lets more batches share one reading of the weights.
    return StreamedEvaluator(lambda: model, memory=min(STATES, budget.room(states, STATES)))


def metrics_line(metrics: dict[str, float]) -> str:
    """Return metrics as one line, in the reference's order and format."""
    return ", ".join(f"{name} = {value:.7g}" for name, value in sorted(metrics.items()))
