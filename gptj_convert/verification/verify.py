"""Prove that a converted checkpoint is its source: structure, every bit, and what it computes.

Levels run from cheap to dear and stop at the first that fails, unless all are asked for. What is
wrong with the converted side is a finding; a source that cannot be read, or is no longer what was
converted, is a fault, since nothing can be judged then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj_convert.checkpoint.open import Checkpoint, open_checkpoint
from gptj_convert.conversion.manifest import MANIFEST_FILE, Manifest
from gptj_convert.conversion.merged_checkpoint import open_merged
from gptj_convert.conversion.plan import match
from gptj_convert.options import MODEL_LEVELS, TASKS_LEVEL, levels_up_to
from gptj_convert.streams.progress import Work
from gptj_convert.verification.evidence.source_check import refuse_changed_source
from gptj_convert.verification.evidence.verdict import LevelResult, Verdict
from gptj_convert.verification.levels import weights
from gptj_convert.verification.levels.structure import check_files, check_structure, unopened
from gptj_model.config import differing_fields
from gptj_model.errors import ConfigError, FileFault, GptjError, TensorFault, UsageError

if TYPE_CHECKING:
    from gptj_convert.verification.levels.task_requests import TaskRequests

#: Fields that must be equal for two models to run side by side.
_SIDE_BY_SIDE = ("vocab_size", "n_positions", "n_embd", "n_layer")


def source_of(converted: Path) -> Path:
    """Return the source that a converted folder's manifest names.

    Raises:
        FileFault: `converted` does not exist.
        UsageError: no manifest names a source.
    """
    _refuse_nothing_there(converted)
    path = _stated_source(converted).get("path")
    if not isinstance(path, str):
        raise UsageError(
            f"{converted}: no {MANIFEST_FILE} that names a source",
            hint="name the original with `--against SRC`",
        )
    return Path(path)


def adapter_of(converted: Path, against: Path) -> Path | None:
    """Return the adapter that was merged into a source, if the manifest names both; a damaged
    manifest is reported later."""
    try:
        stated = _stated_source(converted)
    except FileFault:
        return None
    adapter = stated.get("adapter")
    same = stated.get("path") == str(against.absolute())
    path = adapter.get("path") if same and isinstance(adapter, dict) else None
    return Path(path) if isinstance(path, str) else None


def open_source(
    converted: Path, against: Path, adapter: Path | None = None, *, config_file: Path | None = None
) -> Checkpoint:
    """Open a source as it was converted: with its vocabulary, and without what was dropped.

    Args:
        converted: checkpoint that was made from it.
        against, adapter, config_file: see `verify`.

    Raises:
        GptjError: see `open_merged`.
    """
    choice, dropped = _choices(converted)
    return open_merged(against, adapter, config_file=config_file, vocab_choice=choice, drop=dropped)


def _folder(converted: Path) -> Path:
    return converted if converted.is_dir() else converted.parent


def _stated_source(converted: Path) -> Mapping[str, Any]:
    manifest = Manifest.read(_folder(converted))
    return manifest.source if manifest and isinstance(manifest.source, dict) else {}


def _choices(converted: Path) -> tuple[str | None, list[str]]:
    """Return how the conversion chose the source's vocab_size, and the tensors that it dropped.

    A damaged manifest is reported later.
    """
    try:
        stated = _stated_source(converted)
    except FileFault:
        return None, []
    dropped = stated.get("dropped")
    listed = dropped if isinstance(dropped, list) else []
    return stated.get("vocab_size"), [name for name in listed if isinstance(name, str)]


def verify(
    converted: Path,
    against: Path,
    *,
    tolerance: float,
    level: str,
    adapter: Path | None = None,
    config_file: Path | None = None,
    keep_going: bool = False,
    thorough: bool = False,
    tasks: TaskRequests | None = None,
) -> Work[Verdict]:
    """Judge a converted checkpoint level by level, and return the verdict.

    Args:
        converted: checkpoint to judge.
        against: source that it must equal.
        tolerance: largest |Δ| of logits over their standard deviation that passes.
        level: last level to run, or `ALL_LEVELS`.
        adapter: folder of an adapter to merge into the source first.
        config_file: configuration of a side that has none beside it.
        keep_going: whether to run a level, as far as possible, although an earlier one failed.
        thorough: whether level logits also runs a prompt of the model's full length.
        tasks: requests of level tasks; None stands for those that are built in.

    Raises:
        GptjError: the source cannot be read or has changed, or `converted` does not exist.
    """
    verdict = Verdict(tolerance, levels_up_to(level))
    _refuse_nothing_there(converted)
    with open_source(converted, against, adapter, config_file=config_file) as source:
        expected = match(source)
        result = verdict.levels["structure"] = LevelResult(ok=False)
        manifest, of_files = check_files(_folder(converted))
        try:
            checkpoint = open_checkpoint(converted, config_file=config_file)
        except (FileFault, ConfigError, TensorFault) as e:
            verdict.note(unopened(e, of_files), *of_files)
            if keep_going:
                reason = {"not_run": "the checkpoint cannot be opened"}
                verdict.levels |= {n: LevelResult(False, reason) for n in verdict.asked[1:]}
            return verdict
        with checkpoint:
            faults = check_structure(checkpoint, source, config_file, of_files)
            if faults:
                refuse_changed_source(source, manifest)
            else:
                result.figures |= {
                    "tensors": len(matched := match(checkpoint)),
                    "parameters": sum(tensor.size for tensor, _, _ in matched),
                }
            result.ok = not faults and not of_files
            verdict.note(*faults)
            # A tensor's name says more than a file's hash, which therefore ends nothing yet, and
            # comes last.
            if "weights" in verdict.asked and (keep_going or not faults):
                named = {d.file for d in of_files}
                yield from weights.compare(checkpoint, source, expected, manifest, verdict, named)
            verdict.note(*of_files)
            for name in MODEL_LEVELS:
                if name in verdict.asked and (keep_going or not verdict.differences):
                    run = _model_level(name, thorough=thorough, tasks=tasks)
                    yield from _if_possible(name, run, checkpoint, source, verdict)
    return verdict


def _refuse_nothing_there(converted: Path) -> None:
    """Raise a FileFault unless there is something to judge."""
    if not converted.exists() and not list(converted.parent.glob(f"{converted.name}.*")):
        raise FileFault(
            f"{converted}: not found, expected a converted checkpoint",
            hint="make one with `gptj convert --to tf`",
        )


_Run = Callable[[Checkpoint, Checkpoint, Verdict], Work[None]]


def _model_level(level: str, *, thorough: bool, tasks: TaskRequests | None) -> _Run:
    """Return the function that runs a level; the models' libraries are loaded only here."""
    if level == "logits":
        from gptj_convert.verification.levels.logits import compare_outputs

        return lambda *sides: compare_outputs(*sides, thorough=thorough)
    if level == "gradients":
        from gptj_convert.verification.levels.gradients import compare_gradients

        return compare_gradients
    if level == TASKS_LEVEL:
        from gptj_convert.verification.levels.tasks import compare_tasks

        return lambda *sides: compare_tasks(*sides, asked=tasks)
    from gptj_convert.verification.levels.generation import compare_generation

    return compare_generation


def _if_possible(
    level: str, run: _Run, checkpoint: Checkpoint, source: Checkpoint, verdict: Verdict
) -> Work[None]:
    """Run a level, or say why it did not run on a checkpoint that already differs."""
    unlike = differing_fields(checkpoint.config, source.config).keys() & _SIDE_BY_SIDE
    try:
        if unlike:
            raise ConfigError(f"{', '.join(sorted(unlike))} differ")
        yield from run(checkpoint, source, verdict)
    except GptjError as e:
        if not verdict.differences:
            raise
        verdict.levels[level] = LevelResult(False, {"not_run": e.message})
