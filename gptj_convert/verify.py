"""Prove that a converted checkpoint is its source: structure, every bit, and what it computes.

Levels run from cheap to dear and stop at the first that fails, unless all are asked for. What is
wrong with the converted side is a finding; a source that cannot be read, or is no longer what was
converted, is a fault, since nothing can be judged then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert import vocabulary
from gptj_convert.capacity import comparison_memory, logits_memory
from gptj_convert.checkpoint import Checkpoint, open_checkpoint
from gptj_convert.diagnosis import diagnose, of_file, of_vocabulary
from gptj_convert.formats.bundle import BundleSource, index_path
from gptj_convert.integrity import BUNDLE_INDEX, StatedFile, stated_checksums
from gptj_convert.manifest import MANIFEST_FILE, Manifest, describe_source
from gptj_convert.options import LEVELS
from gptj_convert.plan import head_is_embedding, match
from gptj_convert.progress import Progress
from gptj_convert.survey import survey
from gptj_convert.weights_level import (
    Compared,
    compare_weights,
    in_file_order,
    new_duplicates,
    new_zeros,
    pair_up,
)
from gptj_model.config import CONFIG_FILE, NOT_COMPUTED, GPTJConfig, differing_fields
from gptj_model.errors import ConfigError, FileFault, GptjError, TensorFault, UsageError
from gptj_model.source import TensorInfo
from gptj_model.tensors import Tensor, table

#: Files up to this size are hashed at level structure, larger ones at level weights.
_SMALL_FILE = 2**20


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which the two sides differ."""

    level: str
    found: str
    expected: str
    tensor: dict[str, str] | None = None
    """The tensor's names: {hf, tf, cs}."""
    block: int | None = None
    prompt: str | None = None
    file: str | None = None
    diagnosis: str | None = None
    """What may have happened, where that was found out."""

    @property
    def place(self) -> str:
        """Where, in words."""
        if self.tensor:
            return f"tensor {self.tensor['hf']} ({self.tensor['tf']})"
        if self.file:
            return f"file {self.file}"
        if self.prompt is not None:
            at = "the head" if self.block is None else f"block {self.block}"
            return f"prompt {self.prompt!r}, first in {at}"
        return "the checkpoint"


@dataclass(slots=True)
class LevelResult:
    """Outcome of one level."""

    ok: bool
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Verdict:
    """Outcome of a verification, filled level by level."""

    tolerance: float
    asked: tuple[str, ...] = LEVELS
    """The levels to run."""
    levels: dict[str, LevelResult] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    diagnosis: list[str] = field(default_factory=list)
    """What may have happened, each cause once."""
    planned_memory: int | None = None
    """Bytes of the levels that were begun, by `capacity`."""

    @property
    def ok(self) -> bool:
        """Whether every level that was asked for ran and passed, and nothing differed."""
        ran = [self.levels[name].ok for name in self.asked if name in self.levels]
        return not self.differences and all(ran) and len(ran) == len(self.asked)

    @property
    def first_difference(self) -> Difference | None:
        """The first, if anything differs."""
        return self.differences[0] if self.differences else None

    def to_json(self) -> dict[str, Any]:
        """The fields of the JSON object."""
        first = self.first_difference
        return {
            "levels": {name: {"ok": r.ok, **r.figures} for name, r in self.levels.items()},
            "first_difference": asdict(first) if first else None,
            "diagnosis": self.diagnosis,
            "tolerance": self.tolerance,
            "planned_rss_bytes": self.planned_memory,
        }


def levels_up_to(level: str) -> tuple[str, ...]:
    """The levels that are asked for by naming the last of them."""
    return LEVELS[: LEVELS.index(level) + 1]


def source_of(converted: Path) -> Path:
    """The source that a converted folder's manifest names.

    Raises:
        UsageError: there is no manifest that names one.
    """
    path = _stated_source(converted).get("path")
    if not isinstance(path, str):
        raise UsageError(
            f"{converted}: no {MANIFEST_FILE} that names a source",
            hint="name the original with `--against SRC`",
        )
    return Path(path)


def _folder(converted: Path) -> Path:
    return converted if converted.is_dir() else converted.parent


def _stated_source(converted: Path) -> Mapping[str, Any]:
    manifest = Manifest.read(_folder(converted))
    return manifest.source if manifest and isinstance(manifest.source, dict) else {}


def _vocab_choice(converted: Path) -> str | None:
    """How the conversion chose the source's vocab_size; a damaged manifest is found later."""
    try:
        return _stated_source(converted).get("vocab_size")
    except FileFault:
        return None


def verify(
    converted: Path,
    against: Path,
    verdict: Verdict,
    *,
    config_file: Path | None = None,
    keep_going: bool = False,
) -> Iterator[Progress]:
    """Fill a verdict, level by level as it asks, yielding progress.

    Args:
        converted: what is to be judged.
        against: what it must equal.
        verdict: is filled; its tolerance is the largest |Δ| of logits over their standard
            deviation that passes.
        config_file: for a bundle without a config beside it.
        keep_going: run a level, as far as that is possible, although one before it failed.

    Raises:
        GptjError: the source cannot be read or has changed, or there is nothing at `converted`.
    """
    if not converted.exists() and not list(converted.parent.glob(f"{converted.name}.*")):
        raise FileFault(
            f"{converted}: not found, expected a converted checkpoint",
            hint="`gptj convert --to tf` makes one",
        )
    choice = _vocab_choice(converted)
    with open_checkpoint(against, config_file=config_file, vocab_choice=choice) as source:
        expected = match(source)
        result = verdict.levels["structure"] = LevelResult(ok=False)
        manifest, of_files = _files(_folder(converted))
        try:
            checkpoint = open_checkpoint(converted, config_file=config_file)
        except (FileFault, ConfigError, TensorFault) as e:
            _note(verdict, _unopened(e, of_files), *of_files)
            if keep_going:
                reason = {"not_run": "the checkpoint cannot be opened"}
                verdict.levels |= {n: LevelResult(False, reason) for n in verdict.asked[1:]}
            return
        with checkpoint:
            faults = _structure(checkpoint, source, config_file, of_files)
            if faults:
                _refuse_changed_source(source, manifest)
            else:
                result.figures |= {
                    "tensors": len(matched := match(checkpoint)),
                    "parameters": sum(tensor.size for tensor, _, _ in matched),
                }
            result.ok = not faults and not of_files
            _note(verdict, *faults)
            # A file's hash says less than a tensor's name: it ends nothing yet, and comes last.
            if "weights" in verdict.asked and (keep_going or not faults):
                named = {d.file for d in of_files}
                yield from _weights(checkpoint, source, expected, manifest, verdict, named)
            _note(verdict, *of_files)
            if "logits" in verdict.asked and (keep_going or not verdict.differences):
                yield from _logits_if_possible(checkpoint, source, verdict)


def _note(verdict: Verdict, *differences: Difference) -> None:
    """Add differences, and what their diagnosis is."""
    verdict.differences += differences
    for d in differences:
        text = d.diagnosis and f"{d.file}: {d.diagnosis}" if d.file else d.diagnosis
        if text and text not in verdict.diagnosis:
            verdict.diagnosis.append(text)


# Level structure.


def _files(folder: Path) -> tuple[Manifest | None, list[Difference]]:
    """The manifest, and the files that are not what it says; of large ones only by their size."""
    try:
        manifest = Manifest.read(folder)
    except FileFault as e:
        return None, [Difference("structure", e.message, "a manifest", file=MANIFEST_FILE)]
    found = []
    for name, stated in (manifest.files if manifest else {}).items():
        file = StatedFile(folder / name, stated["bytes"], stated["sha256"])
        size = _size(file.path)
        if stated["bytes"] <= _SMALL_FILE or size != stated["bytes"]:
            for _ in file:
                pass
            if file.fault:
                found.append(_file_difference("structure", file))
    return manifest, found


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _file_difference(level: str, file: StatedFile) -> Difference:
    found, expected = file.fault or ("", "")
    diagnosis = of_file(_size(file.path), file.size)
    return Difference(level, found, expected, file=file.path.name, diagnosis=diagnosis)


def _unopened(fault: GptjError, of_files: Sequence[Difference]) -> Difference:
    """That the checkpoint cannot be opened; with the file that may be why."""
    found = "; ".join(fault.problems) if isinstance(fault, TensorFault) else fault.message
    named = [d for d in of_files if d.file and d.file in found] or of_files
    file, diagnosis = (named[0].file, named[0].diagnosis) if named else (None, None)
    return Difference("structure", found, "a whole checkpoint", file=file, diagnosis=diagnosis)


def _structure(
    checkpoint: Checkpoint,
    source: Checkpoint,
    config_file: Path | None,
    of_files: Sequence[Difference],
) -> list[Difference]:
    """How config and tensors are not those of the source."""
    wanted = source.config
    if checkpoint.config.tie_word_embeddings and not wanted.tie_word_embeddings:
        # The same model, if the head that was left out is the embedding once more.
        wanted = replace(wanted, tie_word_embeddings=head_is_embedding(source))
    rows = vocabulary.rows(checkpoint.config, checkpoint.scheme, checkpoint.source.tensors)
    resized = of_vocabulary(rows, wanted.vocab_size)
    differences = []
    if differing := _config_differences(checkpoint.config, wanted):
        beside = not config_file and (checkpoint.folder / CONFIG_FILE).is_file()
        file = CONFIG_FILE if beside else None
        edited = next((d.diagnosis for d in of_files if file and d.file == file), None)
        diagnosis = resized or edited
        differences.append(Difference("structure", *differing, file=file, diagnosis=diagnosis))
    try:
        match(checkpoint)
    except TensorFault as e:
        tensor, diagnosis = _faulty_tensor(checkpoint)
        found = "; ".join(e.problems)
        differences.append(
            Difference(
                "structure",
                found,
                "the tensors of the source",
                tensor=tensor,
                diagnosis=resized or diagnosis,
            )
        )
    return differences


def _faulty_tensor(checkpoint: Checkpoint) -> tuple[dict[str, str] | None, str | None]:
    """Names of the first tensor that is missing or of another shape, and what became of it."""
    findings = [
        f
        for f in survey(checkpoint.source.tensors, checkpoint.scheme, checkpoint.config)
        if f.tensor
    ]
    faulty = next((f for f in findings if f.problem), None)
    if not faulty or not faulty.tensor:
        return None, None
    missing = [f for f in findings if not f.info]
    text = None
    if faulty in missing:
        text = f"{len(missing)} of {len(findings)} tensors were left out"
    return _names(faulty.tensor), text


def _names(tensor: Tensor) -> dict[str, str]:
    return {"hf": tensor.hf, "tf": tensor.tf, "cs": tensor.cs[0]}


def _config_differences(found: GPTJConfig, expected: GPTJConfig) -> tuple[str, str] | None:
    pairs = differing_fields(found, expected)
    differing = {name: pair for name, pair in pairs.items() if name not in NOT_COMPUTED}
    if not differing:
        return None
    sides = zip(*differing.values(), strict=True)
    found_text, expected_text = (
        ", ".join(f"{n} = {v!r}" for n, v in zip(differing, values, strict=True))
        for values in sides
    )
    return found_text, expected_text


def _is_stated(source: Checkpoint, manifest: Manifest | None) -> bool:
    """Whether the manifest is of a conversion of what is at the source's path."""
    if not manifest:
        return False
    now = describe_source(source)
    return all(manifest.source.get(key) == now[key] for key in ("path", "format"))


def _refuse_changed_source(
    source: Checkpoint, manifest: Manifest | None, changed: Sequence[str] = ()
) -> None:
    """Judge nothing by a source that is no longer what was converted.

    Args:
        source, manifest: see `_is_stated`.
        changed: HF names of tensors that are not what the manifest says they were.

    Raises:
        FileFault: it has changed.
    """
    if not manifest or not _is_stated(source, manifest):
        return
    what = f"tensor {changed[0]}" if changed else "the size of its files"
    if changed or manifest.source.get("files") != describe_source(source)["files"]:
        more = f" and {len(changed) - 1} more tensors" if len(changed) > 1 else ""
        raise FileFault(
            f"{source.path}: has changed since it was converted, by {MANIFEST_FILE}: {what}{more}",
            hint="convert it again, or name the original with `--against SRC`",
        )


# Level weights.


def _weights(
    checkpoint: Checkpoint,
    source: Checkpoint,
    expected: Sequence[tuple[Tensor, str, TensorInfo]],
    manifest: Manifest | None,
    verdict: Verdict,
    named: Collection[str | None],
) -> Iterator[Progress]:
    """Every tensor, bit for bit after rounding the source to the converted dtype.

    Args:
        checkpoint, source: the sides.
        expected: `match` of the source.
        manifest: of the converted side.
        verdict: is filled.
        named: files that level structure has found to differ.
    """
    result = verdict.levels["weights"] = LevelResult(ok=False)
    findings = survey(checkpoint.source.tensors, checkpoint.scheme, checkpoint.config)
    sound = [(f.tensor, f.name, f.info) for f in findings if f.tensor and f.info and not f.problem]
    pairs = pair_up(expected, source.scheme, sound, checkpoint.scheme)
    verdict.planned_memory = comparison_memory(
        (p.source, p.op, p.info) for p in in_file_order(pairs, checkpoint.source)
    )
    files = [
        StatedFile(checkpoint.folder / name, stated["bytes"], stated["sha256"])
        for name, stated in (manifest.files if manifest else {}).items()
        if stated["bytes"] > _SMALL_FILE and name not in named
    ]
    compared: list[Compared] = []
    yield from compare_weights(
        pairs,
        source.source,
        checkpoint.source,
        compared,
        saturated=manifest is not None and manifest.target.get("saturate") is True,
        hashing=chain.from_iterable(files),
    )
    differing = [c for c in compared if c.differing]
    before = len(verdict.differences)
    if manifest and _is_stated(source, manifest):
        changed = _changed_in_source(compared, manifest)
        _refuse_changed_source(source, manifest, [c.pair.tensor.hf for c in changed if c.differing])
        _note(verdict, *map(_source_statement, changed))
    diagnosis = diagnose(compared, source.source, checkpoint.source, source.config)
    verdict.diagnosis += diagnosis.summary
    later = [c for c in differing if _stated_otherwise(c, checkpoint, manifest)]
    if later:
        verdict.diagnosis.append(
            f"{len(later)} of {len(differing)} tensors that differ were changed after they were "
            "written: their checksums are of other values"
        )
    for c in compared:
        by = _stated_otherwise(c, checkpoint, manifest)
        if c.differing:
            text = diagnosis.by_tensor.get(c.pair.tensor.hf)
            verdict.differences.append(_tensor_difference(c, text, by))
        elif by:
            _note(verdict, _statement(c, checkpoint, *by))
    _note(verdict, *(_file_difference("weights", f) for f in files if f.fault))
    compared_names = {c.pair.tensor.hf for c in compared}
    left_out = [t.hf for t in table(checkpoint.config) if t.hf not in compared_names]
    result.ok = len(verdict.differences) == before and not left_out
    result.figures |= {
        "tensors": len(compared),
        "differing": len(differing),
        "nonfinite_values": sum(c.nonfinite_expected for c in compared),
        "bytes_compared": sum(c.pair.info.nbytes for c in compared),
        "not_compared": left_out,
        "nonfinite": {
            c.pair.tensor.hf: {"found": c.nonfinite_found, "expected": c.nonfinite_expected}
            for c in compared
            if c.nonfinite_found or c.nonfinite_expected
        },
        "zero": new_zeros(compared),
        "duplicates": new_duplicates(compared, checkpoint.source),
        "findings": [
            c.to_json() | {"diagnosis": diagnosis.by_tensor.get(c.pair.tensor.hf)}
            for c in differing
        ],
    }


def _changed_in_source(compared: Sequence[Compared], manifest: Manifest) -> list[Compared]:
    """Tensors whose bytes in the source are not those that the manifest says were converted."""
    return [
        c
        for c in compared
        if (stated := manifest.tensors.get(c.pair.tensor.hf, {}).get("source_crc32c"))
        and int(stated, 16) != c.source_crc
    ]


def _source_statement(c: Compared) -> Difference:
    return Difference(
        "weights",
        f"another crc32c of the source's tensor {c.pair.tensor.hf}",
        f"{c.source_crc:08x}",
        file=MANIFEST_FILE,
        diagnosis="the values are the source's; its checksum in this file is not",
    )


def _stated_otherwise(
    c: Compared, checkpoint: Checkpoint, manifest: Manifest | None
) -> tuple[str, int] | None:
    """Who states another checksum of a tensor than it has, and which."""
    stated = stated_checksums(checkpoint.source, c.pair.name, manifest, c.pair.tensor.hf)
    return next(((by, crc) for by, crc in stated.items() if crc != c.found_crc), None)


def _tensor_difference(
    c: Compared, diagnosis: str | None, stated: tuple[str, int] | None
) -> Difference:
    size = "" if c.max_abs is None else f", by up to {c.max_abs:.3g}"
    counts = (c.nonfinite_found, c.nonfinite_expected)
    if counts[0] != counts[1]:
        size += f"; {counts[0]} NaN or infinite, expected {counts[1]}"
    found = f"{c.differing} of {c.pair.tensor.size} values differ{size}; first at {c.index}: "
    if stated:
        since = f"changed after it was written, by {stated[0]}"
        diagnosis = f"{diagnosis}; {since}" if diagnosis else since
    return Difference(
        "weights",
        f"{found}{c.found!s}",
        f"{c.expected!s}",
        tensor=c.pair.names,
        diagnosis=diagnosis,
    )


def _statement(c: Compared, checkpoint: Checkpoint, by: str, crc: int) -> Difference:
    """That a checksum is wrong, although the values are right."""
    file = MANIFEST_FILE
    if by == BUNDLE_INDEX and isinstance(checkpoint.source, BundleSource):
        file = index_path(checkpoint.source.prefix).name
    return Difference(
        "weights",
        f"crc32c {crc:08x} by {by}",
        f"{c.found_crc:08x}",
        tensor=c.pair.names,
        file=file,
        diagnosis="the values are the source's; their checksum in this file is not theirs",
    )


# Level logits.

#: Fields that must be equal for two models to be run side by side.
_SIDE_BY_SIDE = ("vocab_size", "n_positions", "n_embd", "n_layer")


def _logits_if_possible(
    checkpoint: Checkpoint, source: Checkpoint, verdict: Verdict
) -> Iterator[Progress]:
    """The level, or why it did not run on a checkpoint that differs already."""
    unlike = differing_fields(checkpoint.config, source.config).keys() & _SIDE_BY_SIDE
    try:
        if unlike:
            raise ConfigError(f"{', '.join(sorted(unlike))} differ")
        yield from _logits(checkpoint, source, verdict)
    except GptjError as e:
        if not verdict.differences:
            raise
        verdict.levels["logits"] = LevelResult(False, {"not_run": e.message})


def _logits(checkpoint: Checkpoint, source: Checkpoint, verdict: Verdict) -> Iterator[Progress]:
    """Hidden states after each block, and logits, against Hugging Face's own model."""
    from golden.compare import compare_logits, relative_difference
    from golden.prompts import battery
    from golden.reference import StreamedReference
    from gptj_model.streaming import StreamedModel

    config, tolerance = source.config, verdict.tolerance
    dtypes = {info.dtype for _, _, info in match(checkpoint)}
    round_to = dtypes.pop() if len(dtypes) == 1 else None
    ours = StreamedModel(checkpoint.config, checkpoint.source, checkpoint.scheme)
    reference = StreamedReference(config, source.source, source.scheme, round_to=round_to)
    prompts = battery(config)
    planned = logits_memory(config, [len(p.ids) for p in prompts])
    verdict.planned_memory = max(verdict.planned_memory or 0, planned)
    stages, done = config.n_layer + 2, 0
    found = [ours.embed(p.ids[None]) for p in prompts]
    expected = [reference.embed(p.ids[None]) for p in prompts]
    hidden: list[list[float]] = [[] for _ in prompts]
    yield Progress(done := done + 1, stages, "embedding")
    for i in range(config.n_layer):
        ours.load_block(i)
        reference.load_block(i)
        for n, prompt in enumerate(prompts):
            found[n] = ours.run_block(found[n], prompt.positions)
            expected[n] = reference.run_block(expected[n], prompt.positions)
            hidden[n].append(relative_difference(found[n], expected[n]))
        yield Progress(done := done + 1, stages, f"block {i}")
    our_logits, their_logits = ours.logits(found), reference.logits(expected)
    rows = []
    for n, prompt in enumerate(prompts):
        figures = compare_logits(our_logits[n][0], their_logits[n][0])
        if np.isnan(figures.relative):
            raise GptjError(
                f"prompt {prompt.name!r}: logits are NaN, so nothing can be judged",
                hint="the weights hold NaN or infinite values; `--level weights` compares bits",
            )
        rows.append(
            {"name": prompt.name, "tokens": len(prompt.ids), **asdict(figures), "hidden": hidden[n]}
        )
        if not figures.relative <= tolerance:
            block = next((i for i, d in enumerate(hidden[n]) if not d <= tolerance), None)
            verdict.differences.append(
                Difference(
                    "logits",
                    f"max |Δ| of logits is {figures.relative:.3g} of their standard deviation",
                    f"at most {tolerance:g}",
                    block=block,
                    prompt=prompt.name,
                )
            )
    yield Progress(stages, stages, "logits")
    verdict.levels["logits"] = LevelResult(
        ok=all(row["relative"] <= tolerance for row in rows),
        figures={
            "max_abs": max(row["max_abs"] for row in rows),
            "relative": max(row["relative"] for row in rows),
            "max_kl": max(row["max_kl"] for row in rows),
            "top1": min(row["top1"] for row in rows),
            "prompts": rows,
        },
    )
