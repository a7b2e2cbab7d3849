"""`gptj eval --task summarization`: summaries of a test set, scored by ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.output import Output, json_line
from runner.cli.shared.progress import progress
from runner.cli.shared.tokenizer_notes import note_tokenizer
from runner.data.making.file_patterns import PAIR_FILES

if TYPE_CHECKING:
    from gptj_model.decoding.generation import Generator
    from gptj_model.decoding.options import GenerationOptions


def evaluate_summaries(
    output: Output,
    model: Path,
    sources: tuple[Path, ...],
    *,
    beams: tuple[int, ...],
    max_new_tokens: int,
    min_new_tokens: int,
    limit: int,
    truncate_article: bool,
    summaries: Path | None,
) -> dict[str, Any]:
    """Generate with each number of beams, print the mean scores, and return the fields of the JSON
    object.

    Raises:
        GptjError: the model, its tokenizer or the test set cannot be used.
    """
    if not sources:
        raise click.UsageError("--task summarization needs a test set: --data FILE")
    from gptj_model.decoding.generation import Generator
    from gptj_model.decoding.options import GenerationOptions
    from gptj_model.errors import DataFault
    from runner.data.making.sources import find_source_files
    from runner.data.making.summarization import SEPARATOR_ID
    from runner.data.making.tokenizer import end_of_text, load_tokenizer
    from runner.evaluation.restore import load_model
    from runner.evaluation.summaries import METRICS, Prompting, read_pairs, summarize

    paths = [path for path, _ in find_source_files(sources, PAIR_FILES)]
    folder = model if model.is_dir() else model.parent
    note_tokenizer(output, folder)
    tokenizer, end = load_tokenizer(folder), end_of_text(folder)
    loaded = load_model(model)
    if loaded.config.vocab_size <= SEPARATOR_ID:
        raise click.UsageError(f"{model}: its vocabulary has no slot for the separator")
    prompting = Prompting(
        tokenizer=tokenizer,
        begin=end,
        longest=loaded.config.n_positions - max_new_tokens,
        truncate_article=truncate_article,
    )
    generator = Generator(loaded, stop_at=[end])
    lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for width in beams:
        options = GenerationOptions(num_beams=width, early_stopping=True, **lengths)
        name = "greedy" if width == 1 else f"beam{width}"
        found = []
        with TemporaryDirectory() as spool, progress(output, name, in_bytes=False) as report:
            pairs = islice(read_pairs(paths, Path(spool)), limit or None)
            for summary in summarize(pairs, prompting, partial(_continue, generator, options)):
                found.append(summary)
                report(len(found), limit or len(found), "summaries")
        if not found:
            raise DataFault(f"{', '.join(map(str, sources))}: holds no pair")
        means = {m: sum(s.scores[m] for s in found) / len(found) for m in METRICS}
        metrics |= {f"{name}/{m}": value for m, value in means.items()}
        rows += [{"decoding": name, "found": s.found, "expected": s.expected} for s in found]
        figures = ", ".join(f"{m} = {value:.2f}" for m, value in means.items())
        output.data(f"{name}, {len(found)} summaries: {figures}")
    if summaries:
        _write(summaries, rows)
    return {"metrics": metrics, "summaries": len(rows) // len(beams)}


def _continue(generator: Generator, options: GenerationOptions, prompt: Sequence[int]) -> list[int]:
    ((found,),) = generator([prompt], options)
    return found.ids


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json_line(row, "utf-8") + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
