"""`gptj eval`: metrics of a model over records, texts or summaries."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.evaluation.harness import (
    PREFIX,
    Asked,
    TaskType,
    evaluate_tasks,
    fewshot_option,
    include_option,
)
from runner.cli.evaluation.records import evaluate_model
from runner.cli.evaluation.text import evaluate_text
from runner.cli.shared.command import command, parse_settings
from runner.cli.shared.memory_budget import MemoryBudget, execution_within, memory_option
from runner.cli.shared.model_choice import default_model, params_for
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import (
    COUNT,
    COUNT_OR_ZERO,
    PATH,
    PLACE,
    backend_option,
    eval_steps_option,
    execution_option,
    model_option,
    params_option,
    settings_option,
)
from runner.cli.shared.output import Output
from runner.config.execution import Execution

_LM_EVAL = "--task lm-eval:NAMES"


def _mode(values: Mapping[str, Any]) -> str:
    return _LM_EVAL if values["task"].startswith(PREFIX) else f"--task {values['task']}"


RULES = OptionRules(
    mode=_mode,
    takes={
        "--task records": ("--params", "--set", "--eval-steps", "--execution", "--memory"),
        "--task text": (
            "--data", "--window", "--stride", "--batch-size", "--execution", "--memory",
        ),
        "--task summarization": (
            "--data", "--beams", "--max-new-tokens", "--min-new-tokens", "--limit",
            "--truncate-article", "--summaries", "--article-column", "--summary-column",
            "--template", "--preset", "--batch-size",
        ),
        _LM_EVAL: (
            "--include-path", "--num-fewshot", "--limit", "--batch-size", "--work-dir",
            "--execution", "--memory",
        ),
    },
)  # fmt: skip


@command(
    "gptj eval --model converted/ --eval-steps 50",
    "gptj eval --task text --data book.txt",
    "gptj eval --task lm-eval:lambada_openai,hellaswag,piqa,winogrande",
    rules=RULES,
)
@model_option
@params_option
@eval_steps_option
@execution_option
@backend_option
@memory_option
@settings_option
@click.option(
    "--task",
    type=TaskType(["records", "text", "summarization"]),
    default="records",
    show_default=True,
    help="What is evaluated: the records of eval_input, the texts of --data, summaries that the "
    "model writes of the articles of --data, scored by ROUGE, or tasks of EleutherAI's "
    "lm-evaluation-harness, such as lm-eval:piqa,hellaswag.",
)
@click.option(
    "--data",
    "sources",
    type=PLACE,
    multiple=True,
    help="UTF-8 text file (--task text), or test set of articles and summaries as `gptj data "
    "summarization` reads it; can be given several times.",
)
@click.option(
    "--window", type=COUNT, help="Tokens per window of a text.  [default: the model's n_positions]"
)
@click.option(
    "--stride",
    type=COUNT,
    help="Tokens from one window of a text to the next; the others are context.  "
    "[default: half a window]",
)
@click.option(
    "--batch-size",
    type=COUNT,
    default=4,
    show_default=True,
    help="Number of windows of a text, of summaries, or of requests of the harness, that are "
    "computed together.",
)
@click.option(
    "--beams",
    type=click.IntRange(min=1, max=64),
    multiple=True,
    help="Number of beams of the search, 1 for greedy decoding; can be given several times.  "
    "[default: 1 and 4, or as the preset says]",
)
@click.option(
    "--max-new-tokens",
    type=COUNT,
    help="Largest number of tokens in a summary.  [default: 128]",
)
@click.option(
    "--min-new-tokens",
    type=COUNT_OR_ZERO,
    help="Smallest number of tokens in a summary.  [default: 0, or as the preset says]",
)
@click.option(
    "--limit",
    type=COUNT_OR_ZERO,
    default=0,
    help="Number of summaries to write, or of documents of each task of the harness; 0 means all.",
)
@click.option(
    "--truncate-article", is_flag=True, help="Shorten articles that are too long for the model."
)
@click.option(
    "--summaries",
    type=PATH,
    metavar="FILE",
    help="Also write every summary beside the expected one, as JSON lines.",
)
@click.option(
    "--article-column",
    metavar="NAME",
    help="Key or column that holds the article.  [default: article, or as the preset says]",
)
@click.option(
    "--summary-column",
    metavar="NAME",
    help="Key or column that holds the summary.  [default: abstract, highlights or summary]",
)
@click.option(
    "--template",
    metavar="NAME|FILE|DIR",
    help="Render each article as `gptj data instruct` renders records, up to the completion: with "
    "alpaca, dolly, plain, plain-chat, chat (the tokenizer's own), a Jinja file, or the template "
    "of the records in a folder.  [default: as in `gptj data summarization`]",
)
@click.option(
    "--preset",
    type=click.Choice(["mlperf"]),
    help="Data format, prompt and settings of a benchmark: mlperf is that of MLPerf Inference for "
    "GPT-J on CNN/DailyMail. Options that are given win.",
)
@include_option
@fewshot_option
@click.option(
    "--work-dir",
    type=PATH,
    default="lm-eval-answers",
    show_default=True,
    metavar="DIR",
    help="Folder where the answers to the harness's requests are kept: an interrupted run resumes "
    "with them, and no request is computed twice.",
)
def evaluate(
    output: Output,
    model: Path | None,
    params_file: Path | None,
    eval_steps: int | None,
    execution: str | None,
    backend: str | None,
    memory: int | None,
    settings: tuple[str, ...],
    task: str,
    sources: tuple[Path, ...],
    window: int | None,
    stride: int | None,
    batch_size: int,
    limit: int,
    include: tuple[Path, ...],
    fewshot: int | None,
    work_dir: Path,
    **generation: Any,
) -> dict[str, Any]:
    """Print loss, accuracy, perplexity and bits per byte of a model.

    Texts are read in overlapping windows, and every token is scored once. Summaries are scored by
    their mean ROUGE-1, ROUGE-2 and ROUGE-L.
    """
    from gptj_convert.checkpoint.open import open_checkpoint
    from runner.cli.shared import framework

    model = model or default_model()
    if task != "records":
        framework.prepare(backend=backend)
    if task == "summarization":
        from runner.cli.evaluation import summaries

        of_summaries = summaries.Asked(limit=limit, batch_size=batch_size, **generation)
        with ExitStack() as lent:
            return summaries.evaluate_summaries(output, model, sources, of_summaries, lent)
    budget = MemoryBudget(output, memory)
    way = execution_within(memory, execution, lambda: Execution.RESIDENT)
    if task.startswith(PREFIX):
        asked = Asked(
            names=task.removeprefix(PREFIX),
            include=include,
            fewshot=fewshot,
            limit=limit,
            batch_size=batch_size,
            work_dir=work_dir,
            execution=way,
        )
        return evaluate_tasks(output, model, asked, budget)
    if task == "text":
        streamed = budget if way == Execution.STREAMING else None
        return evaluate_text(output, model, sources, window, stride, batch_size, streamed)
    parsed = parse_settings(settings)
    if eval_steps is not None:
        parsed["runconfig.eval_steps"] = eval_steps
    if memory is not None or execution is not None:
        parsed["runconfig.execution"] = way
    if backend is not None:
        parsed["runconfig.backend"] = backend
    with open_checkpoint(model) as checkpoint:
        params = params_for(model, params_file, parsed, checkpoint.config)
    framework.prepare(backend=params.runconfig.backend)
    return {"metrics": evaluate_model(output, model, params, budget), **budget.fields}


evaluate.name = "eval"
