"""`gptj eval`: the reference's metrics of a model on records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.command import PATH, command, parse_settings
from runner.cli.shared.memory_budget import Load, MemoryBudget, execution_within, memory_option
from runner.cli.shared.model_choice import default_model, params_for
from runner.cli.shared.output import Output
from runner.cli.shared.progress import progress
from runner.config.execution import Execution

if TYPE_CHECKING:
    from gptj_convert.checkpoint.open import Checkpoint
    from gptj_model.config import GPTJConfig
    from runner.config.params import Params
    from runner.evaluation.evaluate import Evaluator


@command
@click.option("--model", type=PATH, help="Any checkpoint.  [default: model_dir, or converted]")
@click.option("--params", "params_file", type=PATH, help="YAML.  [default: beside the model]")
@click.option("--eval-steps", type=click.IntRange(min=0), help="Batches; 0 means all.")
@click.option(
    "--execution",
    type=click.Choice([str(way) for way in Execution]),
    help="The whole model in memory, or one block at a time.  [the YAML's]",
)
@memory_option
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A YAML value.")
@click.option(
    "--task",
    type=click.Choice(["records", "text", "summarization"]),
    default="records",
    show_default=True,
    help="text scores the texts of --data; summarization generates summaries of --data and scores "
    "them by ROUGE.",
)
@click.option(
    "--data",
    "sources",
    type=PATH,
    multiple=True,
    help="A text in UTF-8; or a test set with articles and summaries, as for `gptj data "
    "summarization`. May be repeated.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    help="Of a text, tokens that are read together.  [as many as the model can]",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens from one window to the next; the others are context.  [half a window]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Windows that are computed together.",
)
@click.option(
    "--beams",
    type=click.IntRange(min=1, max=64),
    multiple=True,
    default=[1, 4],
    show_default=True,
    help="Candidates that are followed; may be repeated.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--min-new-tokens", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--limit", type=click.IntRange(min=0), default=0, help="Summaries; 0 means all.")
@click.option("--truncate-article", is_flag=True, help="Shorten articles that are too long.")
@click.option(
    "--summaries", type=PATH, metavar="FILE", help="Write the summaries there, a line each."
)
def evaluate(
    output: Output,
    model: Path | None,
    params_file: Path | None,
    eval_steps: int | None,
    execution: str | None,
    memory: int | None,
    settings: tuple[str, ...],
    task: str,
    sources: tuple[Path, ...],
    window: int | None,
    stride: int | None,
    batch_size: int,
    **generation: Any,
) -> dict[str, Any]:
    """Print loss, accuracy, perplexity and bits per byte on the records of eval_input.

    With --task text the same of the texts in --data, read in windows that overlap, every token
    scored once; with --task summarization the mean ROUGE-1, -2 and -L of generated summaries.
    Options from --window to --batch-size are of the first, those from --beams on of the second.
    """
    from runner.cli.shared import framework

    framework.prepare()
    from gptj_convert.checkpoint.open import open_checkpoint

    model = model or default_model()
    if task == "summarization":
        if memory is not None:
            raise click.UsageError("--memory is of --task records and text")
        from runner.cli.shared.summaries import evaluate_summaries

        return evaluate_summaries(output, model, sources, **generation)
    budget = MemoryBudget(output, memory)
    way = execution_within(memory, execution, lambda: Execution.RESIDENT)
    if task == "text":
        streamed = budget if way == Execution.STREAMING else None
        return _evaluate_text(output, model, sources, window, stride, batch_size, streamed)
    parsed = parse_settings(settings)
    if eval_steps is not None:
        parsed["runconfig.eval_steps"] = eval_steps
    if memory is not None or execution is not None:
        parsed["runconfig.execution"] = way
    with open_checkpoint(model) as checkpoint:
        params = params_for(model, params_file, parsed, checkpoint.config)
    return {"metrics": evaluate_model(output, model, params, budget), **budget.fields}


evaluate.name = "eval"


def _evaluate_text(
    output: Output,
    model: Path,
    sources: tuple[Path, ...],
    length: int | None,
    stride: int | None,
    batch_size: int,
    streamed: MemoryBudget | None,
) -> dict[str, Any]:
    from gptj_convert.checkpoint.open import open_checkpoint
    from runner.data.making.tokenizer import notes
    from runner.evaluation.text import Window, evaluate_text, read_text

    if not sources:
        raise click.UsageError("--task text needs a text: --data FILE")
    folder = model if model.is_dir() else model.parent
    for note in notes(folder):
        output.note(note)
    with (
        open_checkpoint(model) as checkpoint,
        progress(output, "evaluating", in_bytes=False) as report,
    ):
        config = checkpoint.config
        length = length or config.n_positions
        stride = stride or -(-length // 2)
        if length > config.n_positions or stride > length:
            raise click.UsageError(
                f"a window is {length} tokens and the next {stride} further on, expected at most "
                f"{config.n_positions} and {length}"
            )
        ids_N, size = read_text(sources, folder)
        window = Window(length=length, stride=stride, batch_size=batch_size)
        if streamed:
            evaluator = _streamed(checkpoint, streamed, batch_size, length)
        else:
            evaluator = _resident(model, config)
        metrics = evaluate_text(
            evaluator, ids_N, size, window, lambda n, all: report(n, all, "batches")
        )
    output.data(metrics_line(metrics))
    fields = streamed.fields if streamed else {}
    return {"metrics": metrics, "tokens": len(ids_N) - 1, "bytes": size, **fields}


def evaluate_model(
    output: Output, model: Path, params: Params, budget: MemoryBudget | None = None
) -> dict[str, float]:
    """Load a model, evaluate it, print the metrics line and return the metrics."""
    from gptj_convert.checkpoint.open import open_checkpoint
    from runner.config.params_file import reconcile
    from runner.evaluation.evaluate import evaluate as run
    from runner.training.train import evaluation_batches

    with (
        open_checkpoint(model) as checkpoint,
        progress(output, "evaluating", in_bytes=False) as report,
    ):
        config = reconcile(params, checkpoint.config, model)
        batches = evaluation_batches(params, config.vocab_size)
        section = params.eval_input
        assert section, "there are batches of it"
        if params.runconfig.execution == Execution.STREAMING:
            size = section.batch_size, section.max_sequence_length
            evaluator = _streamed(checkpoint, budget or MemoryBudget(output, None), *size)
        else:
            evaluator = _resident(model, config)
        metrics = run(
            evaluator,
            batches,
            tokens_per_byte=params.tokens_per_byte,
            limit=params.eval_limit,
            report=lambda n: report(n, params.eval_limit or n, "batches"),
        )
    output.data(metrics_line(metrics))
    return metrics


def _resident(model: Path, config: GPTJConfig) -> Evaluator:
    from runner.evaluation.evaluate import ResidentEvaluator
    from runner.evaluation.restore import load_model

    return ResidentEvaluator(load_model(model, adapt=lambda _: config))


def _streamed(checkpoint: Checkpoint, budget: MemoryBudget, batch: int, length: int) -> Evaluator:
    from gptj_convert.conversion.plan import match
    from gptj_model.streaming.forward import StreamedModel
    from runner.evaluation.evaluate import STATES, StreamedEvaluator

    match(checkpoint)
    config = checkpoint.config
    states = 4 * batch * length * config.n_embd
    kept = budget.keep(checkpoint, Load(batch=batch, length=length, states=states))
    model = StreamedModel(config, checkpoint.source, checkpoint.scheme, kept=kept)
    # What is left lets more batches share a reading of the weights.
    room = STATES if budget.spare is None else min(STATES, states + budget.spare)
    return StreamedEvaluator(lambda: model, memory=room)


def metrics_line(metrics: dict[str, float]) -> str:
    """Metrics in the reference's order and manner."""
    return ", ".join(f"{name} = {value:.7g}" for name, value in sorted(metrics.items()))
