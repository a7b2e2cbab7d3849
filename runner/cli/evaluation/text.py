"""`gptj eval --task text`: perplexity of texts, read in overlapping windows."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.evaluation.records import metrics_line, resident_evaluator, streamed_evaluator
from runner.cli.shared.memory_budget import MemoryBudget
from runner.cli.shared.output import Output
from runner.cli.shared.progress import progress
from runner.cli.shared.tokenizer_notes import note_tokenizer


def evaluate_text(
    output: Output,
    model: Path,
    sources: tuple[Path, ...],
    length: int | None,
    stride: int | None,
    batch_size: int,
    streamed: MemoryBudget | None,
) -> dict[str, Any]:
    """Score texts, print the metrics line, and return the fields of the JSON object.

    Args:
        output: where results and notes go.
        model: checkpoint to score.
        sources: UTF-8 text files, scored as one text.
        length: tokens per window; None means `n_positions`.
        stride: tokens from one window to the next; None means half a window.
        batch_size: windows per forward pass.
        streamed: memory budget of a model that is read block by block; None loads it whole.

    Raises:
        UsageError: no text is named, or the windows do not fit the model.
        GptjError: the model, its tokenizer or a text cannot be read.
    """
    from gptj_convert.checkpoint.open import open_checkpoint
    from runner.evaluation.text import Window, read_text
    from runner.evaluation.text import evaluate_text as perplexity

    if not sources:
        raise click.UsageError("--task text needs a text: --data FILE")
    folder = model if model.is_dir() else model.parent
    note_tokenizer(output, folder)
    with (
        open_checkpoint(model) as checkpoint,
        ExitStack() as lent,
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
            evaluator = streamed_evaluator(checkpoint, streamed, batch_size, length)
        else:
            evaluator = resident_evaluator(checkpoint, config, lent)
        metrics = perplexity(
            evaluator, ids_N, size, window, lambda n, all: report(n, all, "batches")
        )
    output.data(metrics_line(metrics))
    fields = streamed.fields if streamed else {}
    return {"metrics": metrics, "tokens": len(ids_N) - 1, "bytes": size, **fields}
