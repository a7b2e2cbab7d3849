"""Execution of a plan: read → lay out → checksum → write, in bounded memory.

Every output offset is known before the first byte. Nothing appears under the output's name until
all of it is durable; an interrupted run resumes after its last complete tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.manifest import (
    EDITED_FILES,
    MANIFEST_FILE,
    Manifest,
    describe_file,
    describe_source,
    describe_target,
)
from gptj_convert.conversion.model_card import model_card
from gptj_convert.conversion.origin import result_lineage
from gptj_convert.conversion.plan import Move, Plan
from gptj_convert.conversion.source_card import carried_document
from gptj_convert.files.journal import Journal
from gptj_convert.files.resumable_folder import has_journal, is_kept, resumable_folder
from gptj_convert.formats.containers.sharded import is_index
from gptj_convert.formats.layouts.hf import CARD_FILE, GENERATION_FILE, settings_files
from gptj_convert.formats.layouts.keras import write_model
from gptj_convert.formats.layouts.tf import CONVERTED_PREFIX, RUN_FILES, STATE_FILE, state_text
from gptj_convert.settings.generation_settings import generation_text
from gptj_convert.settings.params_yaml import PARAMS_FILE, yaml_text
from gptj_convert.settings.pretraining import continued_pretraining
from gptj_convert.settings.trainer_yaml import TRAINER_FILE, trainer
from gptj_convert.streams.pipeline import Pipeline
from gptj_convert.streams.prefetch import TensorPrefetch, TensorRequest
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.streams.strips import Strip
from gptj_convert.streams.writer import ResumePoint, find_resume_point, reserve, write_files
from gptj_model.config import CONFIG_FILE, NOT_CARRIED
from gptj_model.dtypes import count_nonfinite, count_overflows, largest, saturate
from gptj_model.errors import FileFault, TensorFault, UsageError
from gptj_model.op import Op
from gptj_model.source import raw_bytes
from gptj_model.tensors import Scheme

#: Upper bound of the small files beside the weights, in bytes.
_SMALL_FILES = 16 * 2**20
#: What the model card says of values that are not finite, or beyond the dtype's range.
_KEPT = "are NaN or infinite, as they are in the source"
_REPLACED = "lay beyond the range of the dtype, and became its largest value"


@dataclass(frozen=True, slots=True)
class Moved:
    """A tensor that is written."""

    name: str
    """Name in the target."""
    source_crc32c: int
    crc32c: int
    nonfinite: int = 0
    """Number of NaN and infinite values of the source, which are kept."""
    saturated: int = 0
    """Number of values replaced by the largest value of the target's dtype."""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a finished conversion."""

    moved: tuple[Moved, ...]
    """Tensors in the order of the target's bytes."""
    kept_bytes: int
    """Bytes of the target that were reused from an interrupted run."""

    @property
    def nonfinite(self) -> dict[str, int]:
        """Number of NaN and infinite values, by name of the tensor in the target."""
        return {m.name: m.nonfinite for m in self.moved if m.nonfinite}

    @property
    def saturated(self) -> dict[str, int]:
        """Number of replaced values, by name of the tensor in the target."""
        return {m.name: m.saturated for m in self.moved if m.saturated}


def execute(
    plan: Plan, checkpoint: Checkpoint, out: Path, *, force: bool = False, resume: bool = False
) -> Work[Result]:
    """Write the converted checkpoint to `out`, which appears when it is complete.

    Progress is in bytes of the target.

    Args:
        plan: plan from `make_plan`.
        checkpoint: source of the plan.
        out: folder to write.
        force: whether to overwrite an existing folder, and to discard an interrupted run.
        resume: whether to resume an interrupted run; a complete `out` of the same plan is left as
            it is.

    Raises:
        UsageError: `out` exists, or an interrupted run exists, and neither option is given; or that
            run was another conversion.
        FileFault: the source is cut short or has changed, or the disk is too small.
        TensorFault: a value is beyond the range of the target's dtype.
        OSError: writing fails.
    """
    job = _job(plan, checkpoint)
    if is_kept(out, resume=resume, is_complete=lambda: _is_complete(out, job)):
        return Result((), plan.layout.total)
    check = partial(_check_job, job=job, out=out)
    with resumable_folder(out, job, Moved, resume=resume, force=force, check=check) as (
        folder,
        journal,
    ):
        check_space(plan.disk_bytes, out, there=folder.content)
        reserve(plan.layout, folder.content, existing=True)
        try:
            return (yield from _write(plan, checkpoint, folder.content, journal))
        except TensorFault:
            journal.parts.clear()  # resuming would end the same way
            raise


def is_resumable(out: Path) -> bool:
    """Return whether an interrupted conversion to `out` can be resumed."""
    return has_journal(out, Moved)


def states_no_end(checkpoint: Checkpoint) -> bool:
    """Return whether no file beside the weights says where texts end."""
    return not checkpoint.config_file and GENERATION_FILE not in checkpoint.companions


def not_carried(checkpoint: Checkpoint) -> list[str]:
    """Return notes on possible settings of a checkpoint that are not carried into the output."""
    used = {*checkpoint.companions, *(p.name for p in checkpoint.files), CONFIG_FILE, MANIFEST_FILE}
    used.update(RUN_FILES, checkpoint.documents)
    files = [
        name
        for name in settings_files(checkpoint.folder)
        if name not in used and not is_index(name)
    ]
    config = checkpoint.config_file and checkpoint.config_file.name
    fields = [
        f"{config}: {name} is not carried: {why}"
        for name, why in NOT_CARRIED.items()
        if name in checkpoint.config.carried
    ]
    return [*fields, f"not carried: {', '.join(files)}"] if files else fields


def check_space(needed: int, out: Path, *, there: Path | None = None) -> None:
    """Check before the first byte that the disk can hold the output.

    Args:
        needed: bytes of the large files.
        out: folder to write.
        there: folder whose files already take part of the space.

    Raises:
        FileFault: the disk is too small; names bytes needed and free.
    """
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    needed += _SMALL_FILES
    if there:
        needed -= sum(p.stat().st_blocks * 512 for p in there.iterdir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FileFault(
            f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free",
            hint="free some space, or choose a folder on another disk with --out",
        )


def _job(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what is converted into what; an interrupted run resumes only for the same."""
    names = {m.target_name: m.source_name for m in plan.moves}
    return {
        "source": describe_source(checkpoint),
        "changed": _changed(checkpoint),
        "config": plan.config.to_hf(dtype=plan.dtype),
        "target": describe_target(plan),
        "files": [
            [file.name, plan.layout.size(file), [names.get(str(p), "") for p in file.parts]]
            for file in plan.layout.files
        ],
    }


def _check_job(found: Mapping[str, Any], *, job: Mapping[str, Any], out: Path) -> None:
    for key in ("source", "changed"):
        if found.get(key) != job[key]:
            raise FileFault(
                f"{job['source']['path']}: has changed since the conversion was interrupted: "
                f"was {found.get(key)}, is {job[key]}",
                hint="start from scratch with --force",
            )
    for key in ("target", "config", "files"):
        if found.get(key) != job[key]:
            raise UsageError(
                f"{out}: the interrupted conversion was a different one: its {key} was "
                f"{str(found.get(key))[:200]}, now it is {str(job[key])[:200]}",
                hint="give the options it was started with, or start from scratch with --force",
            )


def _is_complete(out: Path, job: Mapping[str, Any]) -> bool:
    try:
        manifest = Manifest.read(out)
    except FileFault:
        return False
    return manifest is not None and (manifest.source, manifest.target) == (
        job["source"],
        job["target"],
    )


def _write(
    plan: Plan, checkpoint: Checkpoint, folder: Path, journal: Journal[Moved]
) -> Work[Result]:
    total = plan.layout.total
    start = yield from find_resume_point(
        plan.layout, folder, {m.name: m.crc32c for m in journal.parts}
    )
    done = kept = start.done
    moved = {m.name: m for m in journal.parts if m.name in start.checksums}
    with Pipeline() as pipeline:
        reader = _Reader(plan, checkpoint, pipeline, start)
        what = "reading"
        for event in write_files(plan.layout, folder, reader.strips, pipeline, start):
            for name, crc in event.tensors:
                what, moved[name] = name, replace(reader.facts[name], crc32c=crc)
                journal.add(moved[name])
            done += event.nbytes
            yield Progress(done, total, what)
    _write_companions(plan, checkpoint, folder)
    _write_documents(plan, checkpoint, folder, moved)
    _check_unchanged(checkpoint, journal)
    manifest = _manifest(plan, checkpoint, folder, journal.job, moved, start.digests)
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return Result(tuple(moved.values()), kept)


class _Reader:
    """The source's tensors in the order of the target's bytes, prefetched."""

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, pipeline: Pipeline, start: ResumePoint
    ) -> None:
        self._saturate = plan.saturate
        self._values = plan.values
        self._where = str(checkpoint.path)
        self._moves = {m.target_name: m for m in plan.moves}
        self._nonfinite: dict[str, int] = {}
        self._overflows: dict[str, int] = {}
        self.facts: dict[str, Moved] = {}
        """Facts about every tensor that is read, except the crc32c of the result."""
        names = plan.layout.tensors_from(start.file, start.offset)
        moves = [self._moves[name] for name in names if name in self._moves]
        wanted = [TensorRequest(m.source_name, m.op, partial(self._look, m)) for m in moves]
        self._ahead = TensorPrefetch(checkpoint.everything, wanted, pipeline, None)

    def strips(self, name: str) -> Iterator[Strip]:
        """Yield the strips of a tensor of the target; tensors must be asked for in order."""
        if name in self._values:
            values = self._values[name].reshape(-1)
            self.facts[name] = Moved(name, crc32c(raw_bytes(values)), 0)
            yield Strip(values, Op.COPY)
            return
        dtype = self._moves[name].target.dtype
        for strip in self._ahead.strips():
            if self._saturate and self._overflows.get(name):
                saturate(strip.values, dtype)
            yield strip
        counts = self._nonfinite.get(name, 0), self._overflows.get(name, 0)
        self.facts[name] = Moved(name, self._ahead.crc, 0, *counts)

    def _look(self, move: Move, values: np.ndarray) -> None:
        name, target = move.target_name, move.target.dtype
        overflows = count_overflows(values, target)
        if overflows and not self._saturate:
            raise TensorFault(
                self._where,
                [
                    f"{move.source_name!r} holds a value beyond ±{largest(target):g}, "
                    f"which {target} cannot hold"
                ],
                hint="convert with --dtype float32 or bfloat16, or set such values to the "
                "largest with --saturate",
            )
        self._nonfinite[name] = self._nonfinite.get(name, 0) + count_nonfinite(values)
        self._overflows[name] = self._overflows.get(name, 0) + overflows


def _changed(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the modification time of each source file, in nanoseconds."""
    return {p.name: p.stat().st_mtime_ns for p in checkpoint.files}


def _check_unchanged(checkpoint: Checkpoint, journal: Journal[Moved]) -> None:
    now = {"source": describe_source(checkpoint), "changed": _changed(checkpoint)}
    if any(journal.job[key] != value for key, value in now.items()):
        raise TensorFault(
            str(checkpoint.path),
            ["its files were changed while they were read"],
            hint="convert again once no other program writes to them",
        )


def _write_companions(plan: Plan, checkpoint: Checkpoint, staging: Path) -> None:
    config = json.dumps(plan.config.to_hf(dtype=plan.dtype), indent=2) + "\n"
    (staging / CONFIG_FILE).write_text(config, encoding="utf-8")
    params = plan.continuation and plan.continuation.params
    params = params or continued_pretraining(plan.config)
    if plan.scheme is Scheme.TF:
        state = state_text([CONVERTED_PREFIX])
        (staging / STATE_FILE).write_text(state, encoding="utf-8")
        (staging / PARAMS_FILE).write_text(yaml_text(params), encoding="utf-8")
    if plan.scheme is Scheme.CS:
        text = yaml_text(trainer(plan.config, params, plan.cs_backend))
        (staging / TRAINER_FILE).write_text(text, encoding="utf-8")
    if plan.scheme is Scheme.KERAS:
        write_model(staging, plan.config, plan.dtype)
    for name in checkpoint.companions:
        if not (folder := (staging / name).parent).is_dir():
            folder.mkdir()
        shutil.copyfile(checkpoint.folder / name, staging / name)
    if states_no_end(checkpoint):
        (staging / GENERATION_FILE).write_text(generation_text(plan.config), encoding="utf-8")


def _write_documents(
    plan: Plan, checkpoint: Checkpoint, staging: Path, moved: Mapping[str, Moved]
) -> None:
    """Copy licenses and model card; where others load the folder, the card becomes that of the
    result."""
    for name in checkpoint.documents:
        (staging / name).write_bytes(carried_document(checkpoint.folder / name))
    if plan.scheme is Scheme.HF:
        counts = [
            f"{sum(getattr(m, field) for m in moved.values())} values {what}."
            for field, what in (("nonfinite", _KEPT), ("saturated", _REPLACED))
            if any(getattr(m, field) for m in moved.values())
        ]
        left_behind = [f"Note: {note}." for note in not_carried(checkpoint)]
        text = model_card(checkpoint, plan, [*counts, *left_behind])
        (staging / CARD_FILE).write_text(text, encoding="utf-8")


def _manifest(
    plan: Plan,
    checkpoint: Checkpoint,
    folder: Path,
    job: Mapping[str, Any],
    moved: Mapping[str, Moved],
    digests: Mapping[str, str],
) -> Manifest:
    files = {
        file.name: {"bytes": plan.layout.size(file), "sha256": digests[file.name]}
        for file in plan.layout.files
    }
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    small = paths.keys() - {*files, *EDITED_FILES, MANIFEST_FILE}
    return Manifest(
        source=job["source"],
        target=job["target"],
        files=files | {name: describe_file(paths[name]) for name in small},
        tensors={
            m.tensor.hf: {
                "source_crc32c": f"{moved[m.target_name].source_crc32c:08x}",
                "crc32c": f"{moved[m.target_name].crc32c:08x}",
            }
            for m in plan.weights
        },
        origin=result_lineage(checkpoint, plan).to_values(),
    )
