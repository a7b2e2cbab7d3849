"""`gptj eval --task lm-eval:NAMES`: tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_convert.options import TASKS_LEVEL, levels_up_to
from gptj_model.errors import UsageError
from runner.cli.shared.memory_budget import Load, MemoryBudget
from runner.cli.shared.options import COUNT_OR_ZERO, PATH
from runner.cli.shared.output import Output
from runner.cli.shared.progress import progress
from runner.cli.shared.tokenizer_notes import note_tokenizer
from runner.config.execution import Execution

if TYPE_CHECKING:
    from gptj_convert.checkpoint.open import Checkpoint
    from gptj_convert.verification.levels.task_requests import TaskRequests
    from gptj_model.streaming.residency import Residency
    from runner.evaluation.harness.kept_answers import KeptAnswers
    from runner.evaluation.harness.language_model import HarnessModel
    from runner.evaluation.harness.queries import Tokens
    from runner.evaluation.harness.tasks import Tasks

#: What comes before the names of tasks in `--task`.
PREFIX = "lm-eval:"
#: Fields of the harness's results that the JSON object repeats.
_FIELDS = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples")


include_option = click.option(
    "--include-path",
    "include",
    type=PATH,
    multiple=True,
    metavar="DIR",
    help="Folder of further task files (YAML) of the harness, which may name local data; can be "
    "given several times.",
)
fewshot_option = click.option(
    "--num-fewshot",
    "fewshot",
    type=COUNT_OR_ZERO,
    help="Number of examples before each question.  [default: as each task says]",
)


class TaskType(click.Choice):
    """Tasks of the harness, or one of the choices, which are tasks of this program."""

    name = "task"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the value; that of the harness's tasks begins with `PREFIX`."""
        if value.startswith(PREFIX):
            if not all(name.strip() for name in value.removeprefix(PREFIX).split(",")):
                self.fail(f"{value!r} lacks a name, such as {PREFIX}piqa,hellaswag", param, ctx)
            return value
        return super().convert(value, param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """Return what the help shows for the value."""
        named = f"{PREFIX}NAMES"
        return f"[{'|'.join([*self.choices, named])}]" if self.choices else named

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Return the error about another value."""
        named = f"{PREFIX}NAMES"
        if not self.choices:
            return f"{value!r} is not {named}, such as {PREFIX}piqa,hellaswag."
        return f"{value!r} is not one of {', '.join(map(repr, self.choices))}, or {named}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What to run, and how."""

    names: str
    """Names of tasks, separated by commas."""
    include: tuple[Path, ...]
    """Folders of further task files."""
    fewshot: int | None
    """Number of examples before each question; None leaves it to each task."""
    limit: int
    """Number of documents of each task; 0 means all."""
    batch_size: int
    """Number of texts per forward pass."""
    work_dir: Path
    """Folder for the answers, which an interrupted run resumes with."""
    execution: str
    """One of `Execution`."""


def evaluate_tasks(
    output: Output, path: Path, asked: Asked, budget: MemoryBudget
) -> dict[str, Any]:
    """Run tasks, print the harness's tables, and return the fields of the JSON object.

    Args:
        output: where tables and notes go.
        path: checkpoint of any format.
        asked: what to run.
        budget: memory of a streamed model.

    Raises:
        GptjError: a task, its data, the model or its tokenizer cannot be used.
    """
    from gptj_convert.checkpoint.open import open_checkpoint
    from runner.evaluation.harness.kept_answers import KeptAnswers, file_of
    from runner.evaluation.harness.tasks import tables

    with ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path))
        note_tokenizer(output, checkpoint.folder)
        tasks = _tasks(output, asked.names, asked.include, asked.fewshot)
        kept = stack.enter_context(KeptAnswers(_file(file_of, asked, checkpoint)))
        try:
            model = _model(
                output, checkpoint, asked, kept, budget, stack, generates=bool(tasks.generating)
            )
            with progress(output, "evaluating", in_bytes=False) as report:
                model.report = report
                results = tasks.run(model, asked.limit)
        except BaseException as e:
            if len(kept):
                e.add_note(f"run the same command again to resume with the answers in {kept.path}")
            raise
    for table in tables(results):
        output.data(table.rstrip())
    _note_answers(output, model, kept)
    return {
        "metrics": _metrics(results["results"]),
        **{name.replace("-", "_"): results[name] for name in _FIELDS if name in results},
        "shortened_requests": model.shortened,
        "reused_answers": kept.reused,
        "answers": str(kept.path),
        **budget.fields,
    }


def requests_of(
    output: Output,
    converted: Path,
    source: Path,
    task: str | None,
    *,
    level: str,
    include: Sequence[Path],
    fewshot: int | None,
    limit: int,
    config_file: Path | None,
) -> TaskRequests | None:
    """Return the requests of tasks, for `gptj verify` to put to both sides; None stands for those
    that are built in.

    Args:
        output: where notes go.
        converted: checkpoint that is judged.
        source: its source, whose tokenizer and context the requests are made for.
        task: `PREFIX` and names of tasks, separated by commas, or None.
        level: last level that runs.
        include, fewshot, limit: see `Asked`.
        config_file: configuration of a checkpoint that has none beside it.

    Raises:
        GptjError: the level does not run tasks; or a task, its data, the checkpoint or its
            tokenizer cannot be used.
    """
    if task is None:
        return None
    if TASKS_LEVEL not in levels_up_to(level):
        raise UsageError(
            f"{task} is asked for, and level {level} does not run tasks",
            hint=f"choose level {TASKS_LEVEL}",
        )
    from gptj_convert.verification.verify import open_source
    from runner.evaluation.harness.compared import collected

    names = task.removeprefix(PREFIX)
    with open_source(converted, source, config_file=config_file) as checkpoint:
        note_tokenizer(output, checkpoint.folder)
        found = collected(_tasks(output, names, include, fewshot), _tokens(checkpoint), limit)
    _note_shortened(output, found.shortened)
    return found.requests


def _tasks(output: Output, names: str, include: Sequence[Path], fewshot: int | None) -> Tasks:
    from runner.evaluation.harness.tasks import Tasks

    tasks = Tasks([name.strip() for name in names.split(",")], include, fewshot)
    if fewshot and tasks.without_examples:
        alone = ", ".join(tasks.without_examples)
        output.note(f"note: asked without examples, as their files say: {alone}")
    return tasks


def _file(file_of: Any, asked: Asked, checkpoint: Checkpoint) -> Path:
    import keras

    return file_of(
        asked.work_dir, checkpoint, execution=asked.execution, backend=keras.backend.backend()
    )


def _model(
    output: Output,
    checkpoint: Checkpoint,
    asked: Asked,
    kept: KeptAnswers,
    budget: MemoryBudget,
    lent: ExitStack,
    *,
    generates: bool,
) -> HarnessModel:
    from gptj_convert.resources.footprint import cache_bytes
    from gptj_convert.settings.generation_settings import generation_defaults
    from runner.evaluation.evaluate import STATES
    from runner.evaluation.harness.language_model import HarnessModel
    from runner.evaluation.restore import model_of

    config, batch = checkpoint.config, asked.batch_size
    states = 4 * batch * config.n_positions * config.n_embd
    if generates:
        states = max(states, cache_bytes(config, batch, config.n_positions))

    def keep(checkpoint: Checkpoint) -> Residency:
        load = Load(batch=batch, length=config.n_positions, states=states)
        return budget.keep(checkpoint, load)

    defaults = generation_defaults(checkpoint.folder, config)
    streams = asked.execution == Execution.STREAMING
    model = model_of(checkpoint, keep=keep if streams else None, lent=lent)
    made = HarnessModel(
        model,
        _tokens(checkpoint),
        batch_size=batch,
        # What the budget leaves lets more texts share one reading of the weights.
        memory=budget.room(states, STATES),
        answers=kept,
        defaults=defaults.values,
    )
    if generates:
        _note_defaults(output, defaults.file.name, defaults.unapplied, made.defaults)
    return made


def _note_defaults(
    output: Output, name: str, unapplied: Collection[str], applied: Collection[str]
) -> None:
    if applied:
        output.note(f"note: {name} sets {', '.join(applied)} of generated texts")
    if unapplied:
        output.note(f"note: {name} sets {', '.join(unapplied)}, which is not applied")


def _tokens(checkpoint: Checkpoint) -> Tokens:
    from gptj_convert.settings.generation_settings import stop_tokens
    from runner.data.making.tokenizer import end_of_text, load_tokenizer, special_tokens
    from runner.evaluation.harness.queries import Tokens

    folder, config = checkpoint.folder, checkpoint.config
    tokenizer, end = load_tokenizer(folder, allow_special=None), end_of_text(folder)
    begin = tokenizer.token_to_id(special_tokens(folder).get("bos_token", ""))
    return Tokens(
        tokenizer=tokenizer,
        end=end,
        prefix=end if begin is None else begin,
        ends=frozenset((end, *stop_tokens(folder, config))),
        positions=config.n_positions,
        vocab_size=config.vocab_size,
    )


def _note_answers(output: Output, model: HarnessModel, kept: KeptAnswers) -> None:
    _note_shortened(output, model.shortened)
    if kept.reused:
        output.note(f"note: answers of earlier runs, reused from {kept.path}: {kept.reused:,}")


def _note_shortened(output: Output, count: int) -> None:
    if count:
        output.note(
            "note: requests that lost their beginning, because they are longer than the model's "
            f"context: {count:,}"
        )


def _metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the figures of all tasks under one name each, such as `piqa/acc,none`."""
    return {
        f"{task}/{metric}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
