"""`gptj eval`: the reference's metrics of a model on records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.evaluation.records import evaluate_model
from runner.cli.evaluation.text import evaluate_text
from runner.cli.shared.command import PATH, command, parse_settings
from runner.cli.shared.memory_budget import MemoryBudget, execution_within, memory_option
from runner.cli.shared.model_choice import default_model, params_for
from runner.cli.shared.output import Output
from runner.config.execution import Execution

if TYPE_CHECKING:
    pass


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
        from runner.cli.evaluation.summaries import evaluate_summaries

        return evaluate_summaries(output, model, sources, **generation)
    budget = MemoryBudget(output, memory)
    way = execution_within(memory, execution, lambda: Execution.RESIDENT)
    if task == "text":
        streamed = budget if way == Execution.STREAMING else None
        return evaluate_text(output, model, sources, window, stride, batch_size, streamed)
    parsed = parse_settings(settings)
    if eval_steps is not None:
        parsed["runconfig.eval_steps"] = eval_steps
    if memory is not None or execution is not None:
        parsed["runconfig.execution"] = way
    with open_checkpoint(model) as checkpoint:
        params = params_for(model, params_file, parsed, checkpoint.config)
    return {"metrics": evaluate_model(output, model, params, budget), **budget.fields}


evaluate.name = "eval"
