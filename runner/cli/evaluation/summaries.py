"""`gptj eval --task summarization`: summaries of a test set, scored by ROUGE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
    from tokenizers import Tokenizer

    from gptj_model.decoding.generation import Generator
    from gptj_model.decoding.options import GenerationOptions
    from runner.data.making.instruction.stated_templates import StatedTemplates
    from runner.evaluation.summaries import Pair, Prompting, Summary
    from runner.evaluation.summary_presets import Preset

#: Settings without a preset.
_BEAMS, _MOST = (1, 4), 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Options of the command; None and () leave a setting to the preset, if there is one."""

    beams: tuple[int, ...]
    max_new_tokens: int | None
    min_new_tokens: int | None
    limit: int
    truncate_article: bool
    summaries: Path | None
    article_column: str | None
    summary_column: str | None
    template: str | None
    preset: str | None
    batch_size: int

    @property
    def settings(self) -> Preset | None:
        """Settings of the preset, if one was named."""
        from runner.evaluation.summary_presets import PRESETS

        return PRESETS[self.preset] if self.preset else None

    @property
    def most(self) -> int:
        """Largest number of tokens in a summary."""
        return self.max_new_tokens or (self.settings.most if self.settings else _MOST)

    @property
    def columns(self) -> tuple[str, str]:
        """Keys of article and summary."""
        from runner.data.making.summarization import ABSTRACT, ARTICLE

        preset = self.settings
        plain = (preset.article, preset.summary) if preset else (ARTICLE, ABSTRACT)
        return self.article_column or plain[0], self.summary_column or plain[1]

    def options(self) -> Iterator[GenerationOptions]:
        """Yield the options of each search."""
        from gptj_model.decoding.options import GenerationOptions

        preset = self.settings
        least = self.min_new_tokens
        if least is None:
            least = preset.least if preset else 0
        for width in self.beams or ((preset.beams,) if preset else _BEAMS):
            yield GenerationOptions(
                num_beams=width,
                early_stopping=True,
                max_new_tokens=self.most,
                min_new_tokens=least,
            )


def evaluate_summaries(
    output: Output, model: Path, sources: tuple[Path, ...], asked: Asked, lent: ExitStack
) -> dict[str, Any]:
    """Generate with each number of beams, print the mean scores, and return the fields of the JSON
    object.

    Raises:
        GptjError: the model, its tokenizer, the template or the test set cannot be used.
    """
    if not sources:
        raise click.UsageError("--task summarization needs a test set: --data FILE")
    from gptj_model.decoding.generation import Generator
    from gptj_model.errors import DataFault
    from runner.data.making.sources import find_source_files
    from runner.data.making.tokenizer import end_of_text, load_tokenizer
    from runner.evaluation.restore import load_model

    paths = [path for path, _ in find_source_files(sources, PAIR_FILES)]
    folder = model if model.is_dir() else model.parent
    note_tokenizer(output, folder)
    tokenizer, end = load_tokenizer(folder), end_of_text(folder)
    loaded = load_model(model, lent=lent)
    room = loaded.config.n_positions - asked.most
    prompting, more = _prompting(output, asked, folder, tokenizer, room)
    _check_vocabulary(model, loaded.config.vocab_size, prompting, asked)
    generator = Generator(loaded, stop_at=[end, *more])
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for options in asked.options():
        name = "greedy" if options.num_beams == 1 else f"beam{options.num_beams}"
        found = _generated(output, name, paths, asked, prompting, generator, options, tokenizer)
        if not found:
            raise DataFault(f"{', '.join(map(str, sources))}: holds no pair")
        metrics |= {f"{name}/{m}": value for m, value in _means(found).items()}
        if asked.preset:  # the benchmark also sets a least total length
            metrics[f"{name}/gen_len"] = sum(len(s.found) for s in found)
        rows += [{"decoding": name, "found": s.found, "expected": s.expected} for s in found]
        figures = ", ".join(f"{m} = {value:.2f}" for m, value in _means(found).items())
        output.data(f"{name}, {len(found)} summaries: {figures}")
    if prompting.shortened:
        output.note(
            f"note: prompts shortened to {prompting.longest:,} tokens: {prompting.shortened:,}"
        )
    if asked.summaries:
        _write(asked.summaries, rows)
    searches = len(list(asked.options()))
    return {
        "metrics": metrics,
        "summaries": len(rows) // searches,
        "shortened_prompts": prompting.shortened,
    }


def _check_vocabulary(model: Path, size: int, prompting: Prompting, asked: Asked) -> None:
    from runner.data.making.summarization import SEPARATOR_ID

    if not asked.template and not asked.preset and size <= SEPARATOR_ID:
        raise click.UsageError(f"{model}: its vocabulary has no slot for the separator")
    if prompting.longest < 1:
        raise click.UsageError(
            f"--max-new-tokens is {asked.most}, expected fewer than the model's context"
        )


def _prompting(
    output: Output, asked: Asked, folder: Path, tokenizer: Tokenizer, room: int
) -> tuple[Prompting, set[int]]:
    """Return what makes prompts of at most `room` tokens, and the ids of further tokens that end a
    summary."""
    from runner.data.making.tokenizer import end_of_text
    from runner.evaluation.summaries import Prompting, rendered, separated
    from runner.generation.prompt_templates import PromptRenderer
    from runner.generation.prompts import Prompt
    from runner.generation.template_choice import named_templates

    preset, truncate = asked.settings, asked.truncate_article
    if asked.template:
        chosen = named_templates(asked.template, folder)
        for note in chosen.notes:
            output.note(note)
        stated = chosen.stated
    elif preset:
        stated = _of_preset(preset)
    else:
        return separated(tokenizer, end_of_text(folder), room, truncate=truncate), set()
    renderer = PromptRenderer(stated, folder)

    def encode(pair: Pair) -> list[int]:
        record = None
        if pair.instruction is not None:
            record = {"instruction": pair.instruction, "input": pair.article}
        (made,) = renderer([Prompt(where=pair.where, text=pair.article, record=record)])
        assert made.ids, "a renderer makes ids"
        return made.ids

    if preset and not asked.template and not truncate:
        longest = min(preset.longest, room)
        # As the benchmark does, whatever of the template is lost.
        cut = Prompting(encode=encode, longest=longest, shorten=lambda pair, ids: ids[:longest])
        return cut, renderer.ends
    return rendered(tokenizer, encode, room, truncate=truncate), renderer.ends


def _of_preset(preset: Preset) -> StatedTemplates:
    from runner.data.making.instruction.shapes import INSTRUCTION
    from runner.data.making.instruction.stated_templates import StatedTemplates
    from runner.data.making.instruction.templates import Template

    template = Template("of the preset", preset.template)
    return StatedTemplates(templates={INSTRUCTION: template}, allow_special=True)


def _generated(
    output: Output,
    name: str,
    paths: Sequence[Path],
    asked: Asked,
    prompting: Prompting,
    generator: Generator,
    options: GenerationOptions,
    tokenizer: Tokenizer,
) -> list[Summary]:
    """Return the summaries of one search."""
    from runner.evaluation.summaries import read_pairs, summarize

    def search(prompts: Sequence[list[int]]) -> list[list[int]]:
        return [best.ids for best, *_ in generator(prompts, options)]

    found: list[Summary] = []
    article, summary = asked.columns
    prompting.shortened = 0
    with TemporaryDirectory() as spool, progress(output, name, in_bytes=False) as report:
        instructions = bool(asked.template or asked.preset)
        pairs = read_pairs(
            paths, Path(spool), article=article, summary=summary, instructions=instructions
        )
        chosen = islice(pairs, asked.limit or None)
        for each in summarize(chosen, prompting, search, tokenizer, asked.batch_size):
            found.append(each)
            report(len(found), asked.limit or len(found), "summaries")
    return found


def _means(found: Sequence[Summary]) -> dict[str, float]:
    """Return the mean of each metric."""
    from runner.evaluation.summaries import METRICS

    return {m: sum(s.scores[m] for s in found) / len(found) for m in METRICS}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = [json_line(row, "utf-8") + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
