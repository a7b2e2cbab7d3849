"""Prove that a converted checkpoint is its source: structure, every bit, and what it computes.

Levels run from cheap to dear and stop at the first that fails. What is wrong with the converted
side is a finding; a source that cannot be read is a fault, since nothing can be judged then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from gptj_convert.capacity import comparison_memory, logits_memory
from gptj_convert.checkpoint import Checkpoint, open_checkpoint
from gptj_convert.integrity import StatedFile, stated_checksums
from gptj_convert.manifest import MANIFEST_FILE, Manifest
from gptj_convert.options import LEVELS
from gptj_convert.panels import Panels
from gptj_convert.plan import head_is_embedding, match
from gptj_convert.progress import Progress
from gptj_model.config import NOT_COMPUTED, GPTJConfig, differing_fields
from gptj_model.dtypes import NUMPY, saturate
from gptj_model.errors import ConfigError, FileFault, GptjError, TensorFault, UsageError
from gptj_model.source import TensorInfo, raw_bytes, read_tensor
from gptj_model.tensors import Op, Tensor

#: Files up to this size are hashed at level structure, larger ones at level weights.
_SMALL_FILE = 2**20


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the two sides differ first."""

    level: str
    found: str
    expected: str
    tensor: dict[str, str] | None = None
    """The tensor's names: {hf, tf, cs}."""
    block: int | None = None
    prompt: str | None = None
    file: str | None = None

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
    levels: dict[str, LevelResult] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    planned_memory: int | None = None
    """Bytes of the levels that were begun, by `capacity`."""

    @property
    def ok(self) -> bool:
        """Whether every level that ran passed, and nothing differed."""
        return not self.differences and all(r.ok for r in self.levels.values())

    @property
    def first_difference(self) -> Difference | None:
        """A damaged tensor if one was found, since a file's hash says less; else the first."""
        by_tensor = [d for d in self.differences if d.tensor]
        return (by_tensor or self.differences or [None])[0]

    def to_json(self) -> dict[str, Any]:
        """The fields of the JSON object."""
        first = self.first_difference
        return {
            "levels": {name: {"ok": r.ok, **r.figures} for name, r in self.levels.items()},
            "first_difference": asdict(first) if first else None,
            "tolerance": self.tolerance,
            "planned_rss_bytes": self.planned_memory,
        }


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


def _stated_source(converted: Path) -> Mapping[str, Any]:
    manifest = Manifest.read(converted if converted.is_dir() else converted.parent)
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
    level: str,
    config_file: Path | None = None,
) -> Iterator[Progress]:
    """Fill a verdict, level by level up to `level`, yielding progress.

    Args:
        converted: what is to be judged.
        against: what it must equal.
        verdict: is filled; its tolerance is the largest |Δ| of logits over their standard
            deviation that passes.
        level: the last of `options.LEVELS` to run.
        config_file: for a bundle without a config beside it.

    Raises:
        GptjError: the source cannot be read, or there is nothing at `converted`.
    """
    choice = _vocab_choice(converted)
    with open_checkpoint(against, config_file=config_file, vocab_choice=choice) as source:
        expected = match(source)
        found = _structure(converted, source, verdict, config_file)
        if found is None:
            return
        with found as checkpoint:
            manifest = _files(checkpoint, verdict)
            if LEVELS.index(level) >= LEVELS.index("weights"):
                targets = {tensor.hf: target for tensor, _, target in match(checkpoint)}
                verdict.planned_memory = comparison_memory(
                    (info, tensor.op(source.scheme, checkpoint.scheme), targets[tensor.hf])
                    for tensor, _, info in expected
                    if tensor.hf in targets
                )
                yield from _weights(checkpoint, source, expected, manifest, verdict)
            if level == "logits" and verdict.ok:
                yield from _logits(checkpoint, source, verdict)


def _structure(
    converted: Path, source: Checkpoint, verdict: Verdict, config_file: Path | None
) -> Checkpoint | None:
    """The converted checkpoint if its structure holds; else a difference in the verdict."""
    if not converted.exists() and not list(converted.parent.glob(f"{converted.name}.*")):
        raise FileFault(
            f"{converted}: not found, expected a converted checkpoint",
            hint="`gptj convert --to tf` makes one",
        )
    result = verdict.levels["structure"] = LevelResult(ok=False)
    try:
        checkpoint = open_checkpoint(converted, config_file=config_file)
    except TensorFault as e:
        verdict.differences.append(
            Difference("structure", "; ".join(e.problems), "a whole checkpoint")
        )
        return None
    except (FileFault, ConfigError) as e:
        verdict.differences.append(Difference("structure", e.message, "a whole checkpoint"))
        return None
    try:
        wanted = source.config
        if checkpoint.config.tie_word_embeddings and not wanted.tie_word_embeddings:
            # The same model, if the head that was left out is the embedding once more.
            shared = head_is_embedding(source)
            wanted = replace(wanted, tie_word_embeddings=shared)
        differing = _config_differences(checkpoint.config, wanted)
        if differing:
            found, expected = differing
            verdict.differences.append(Difference("structure", found, expected))
        else:
            matched = match(checkpoint)
            result.ok = True
            result.figures["tensors"] = len(matched)
            result.figures["parameters"] = sum(t.size for t, _, _ in matched)
    except TensorFault as e:
        verdict.differences.append(
            Difference("structure", "; ".join(e.problems), "the tensors of the source")
        )
    if not result.ok:
        checkpoint.source.close()
        return None
    return checkpoint


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


def _files(checkpoint: Checkpoint, verdict: Verdict) -> Manifest | None:
    """Hold the small files against the manifest; a mismatch does not end the verification."""
    try:
        manifest = Manifest.read(checkpoint.folder)
    except FileFault as e:
        verdict.levels["structure"].ok = False
        verdict.differences.append(
            Difference("structure", e.message, "a manifest", file=MANIFEST_FILE)
        )
        return None
    _compare_hashes("structure", checkpoint, manifest, verdict, large=False)
    return manifest


def _compare_hashes(
    level: str, checkpoint: Checkpoint, manifest: Manifest | None, verdict: Verdict, *, large: bool
) -> None:
    for name, stated in (manifest.files if manifest else {}).items():
        if (stated["bytes"] > _SMALL_FILE) is not large:
            continue
        file = StatedFile(checkpoint.folder / name, stated["bytes"], stated["sha256"])
        for _ in file:
            pass
        if file.fault:
            verdict.levels[level].ok = False
            found, expected = file.fault
            verdict.differences.append(Difference(level, found, expected, file=name))


def _weights(
    checkpoint: Checkpoint,
    source: Checkpoint,
    expected: list[tuple[Tensor, str, TensorInfo]],
    manifest: Manifest | None,
    verdict: Verdict,
) -> Iterator[Progress]:
    """Every tensor, bit for bit after rounding the source to the converted dtype."""
    result = verdict.levels["weights"] = LevelResult(ok=True)
    total = sum(info.nbytes for _, _, info in expected)
    done = differing = nonfinite = 0
    names = {tensor.hf: name for tensor, name, _ in match(checkpoint)}
    for tensor, source_name, info in expected:
        if (name := names.get(tensor.hf)) is None:
            continue  # a head that shares the embedding: see `_structure`
        difference, bad = _compare_tensor(tensor, source, source_name, checkpoint, name, manifest)
        nonfinite += bad
        if difference:
            differing += 1
            verdict.differences.append(difference)
        done += info.nbytes
        yield Progress(done, total, tensor.hf)
    _compare_hashes("weights", checkpoint, manifest, verdict, large=True)
    result.ok = result.ok and not differing
    result.figures |= {
        "tensors": len(expected),
        "differing": differing,
        "nonfinite_values": nonfinite,
        "bytes_compared": total,
    }


def _compare_tensor(
    tensor: Tensor,
    source: Checkpoint,
    source_name: str,
    checkpoint: Checkpoint,
    name: str,
    manifest: Manifest | None,
) -> tuple[Difference | None, int]:
    """The first difference of one tensor, and how many of its values are NaN or infinite."""
    info = checkpoint.source.tensors[name]
    dtype = NUMPY[info.dtype]
    op = tensor.op(source.scheme, checkpoint.scheme)
    saturated = manifest is not None and manifest.target.get("saturate") is True
    panels = Panels(source.source, source_name, op)
    offset = crc = wrong = nonfinite = 0
    first = None
    worst = 0.0
    for values in panels:
        if saturated:
            saturate(values, info.dtype)
        with np.errstate(over="ignore"):
            expected = values.astype(dtype, copy=False).reshape(-1)
        found = np.empty_like(expected)
        checkpoint.source.read_into(name, offset, raw_bytes(found))
        crc = crc32c(raw_bytes(found), crc)
        bits = f"u{dtype.itemsize}"
        unequal = np.flatnonzero(expected.view(bits) != found.view(bits))
        nonfinite += int(np.count_nonzero(~np.isfinite(expected)))
        if unequal.size:
            wrong += unequal.size
            at = int(unequal[0])
            if first is None:
                index = np.unravel_index(offset // dtype.itemsize + at, info.shape)
                first = ([int(i) for i in index], found[at], expected[at])
            with np.errstate(over="ignore", invalid="ignore"):
                delta = np.abs(found[unequal].astype(np.float64) - expected[unequal])
            worst = max(worst, float(np.nanmax(delta, initial=0.0)))
        offset += expected.nbytes
    names = {"hf": tensor.hf, "tf": tensor.tf, "cs": tensor.cs[0]}
    if first is not None:
        index, found_value, expected_value = first
        text = (
            f"{wrong} of {tensor.size} values differ, by up to {worst:.3g}; "
            f"first at {index}: {found_value!s}"
        )
        if _transposition_skipped(tensor, op, source, source_name, checkpoint, name):
            text += " (it equals the source untransposed: the transposition was skipped)"
        return Difference("weights", text, f"{expected_value!s}", tensor=names), nonfinite
    stated = stated_checksums(checkpoint.source, name, manifest, tensor.hf)
    for where, value in stated.items():
        if value != crc:
            found_text = f"crc32c {crc:08x}"
            return (
                Difference("weights", found_text, f"{value:08x} by {where}", tensor=names),
                nonfinite,
            )
    return None, nonfinite


def _transposition_skipped(
    tensor: Tensor,
    op: Op,
    source: Checkpoint,
    source_name: str,
    checkpoint: Checkpoint,
    name: str,
) -> bool:
    rows, *columns = tensor.shape
    if op is not Op.TRANSPOSE or columns != [rows]:
        return False
    found = read_tensor(checkpoint.source, name)
    untransposed = read_tensor(source.source, source_name).astype(found.dtype, copy=False)
    return raw_bytes(found) == raw_bytes(untransposed)


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
