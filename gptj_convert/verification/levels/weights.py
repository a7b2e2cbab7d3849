"""Level weights: every tensor of a converted checkpoint, bit for bit, against its source's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

from gptj_convert.checkpoint.match import survey
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.cost import comparison_memory
from gptj_convert.conversion.manifest import MANIFEST_FILE, Manifest
from gptj_convert.formats.containers.tensor_bundle import BundleSource, index_path
from gptj_convert.inspection.integrity import BUNDLE_INDEX, StatedFile, stated_checksums
from gptj_convert.streams.progress import Work
from gptj_convert.verification.evidence.bitwise import (
    Compared,
    compare_weights,
    in_file_order,
    new_duplicates,
    new_zeros,
    pair_up,
)
from gptj_convert.verification.evidence.diagnosis import Diagnosis, diagnose
from gptj_convert.verification.evidence.source_check import is_stated, refuse_changed_source
from gptj_convert.verification.evidence.verdict import Difference, LevelResult, Verdict
from gptj_convert.verification.levels.structure import SMALL_FILE, file_difference
from gptj_model.source import TensorInfo, TensorSource
from gptj_model.tensors import Tensor, table


def compare(
    checkpoint: Checkpoint,
    source: Checkpoint,
    expected: Sequence[tuple[Tensor, str, TensorInfo]],
    manifest: Manifest | None,
    verdict: Verdict,
    named: Collection[str | None],
) -> Work[None]:
    """Compare every tensor bit for bit, after rounding the source to the converted dtype.

    Args:
        checkpoint, source: both sides.
        expected: result of `match` for the source.
        manifest: manifest of the converted side.
        verdict: verdict that the level is added to.
        named: files that level structure has found to differ.
    """
    result = verdict.levels["weights"] = LevelResult(ok=False)
    findings = survey(checkpoint.source.tensors, checkpoint.scheme, checkpoint.config)
    sound = [(f.tensor, f.name, f.info) for f in findings if f.tensor and f.info and not f.problem]
    pairs = pair_up(expected, source.scheme, sound, checkpoint.scheme)
    verdict.plan_memory(
        comparison_memory((p.source, p.op, p.info) for p in in_file_order(pairs, checkpoint.source))
    )
    files = [
        StatedFile(checkpoint.folder / name, stated["bytes"], stated["sha256"])
        for name, stated in (manifest.files if manifest else {}).items()
        if stated["bytes"] > SMALL_FILE and name not in named
    ]
    compared = yield from compare_weights(
        pairs,
        source.source,
        checkpoint.source,
        saturated=manifest is not None and manifest.target.get("saturate") is True,
        hashing=chain.from_iterable(files),
    )
    differing = [c for c in compared if c.differing]
    before = len(verdict.differences)
    if manifest and is_stated(source, manifest):
        changed = _changed_in_source(compared, manifest)
        refuse_changed_source(source, manifest, [c.pair.tensor.hf for c in changed if c.differing])
        verdict.note(*map(_source_statement, changed))
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
            verdict.note(_statement(c, checkpoint, *by))
    verdict.note(*(file_difference("weights", f) for f in files if f.fault))
    compared_names = {c.pair.tensor.hf for c in compared}
    left_out = [t.hf for t in table(checkpoint.config) if t.hf not in compared_names]
    result.ok = len(verdict.differences) == before and not left_out
    result.figures |= _figures(compared, left_out, diagnosis, checkpoint.source)


def _figures(
    compared: Sequence[Compared],
    left_out: Sequence[str],
    diagnosis: Diagnosis,
    converted: TensorSource,
) -> dict[str, Any]:
    """Return the figures of the level, as the JSON object has them."""
    differing = [c for c in compared if c.differing]
    return {
        "tensors": len(compared),
        "differing": len(differing),
        "nonfinite_values": sum(c.nonfinite_expected for c in compared),
        "bytes_compared": sum(c.pair.info.nbytes for c in compared),
        "not_compared": list(left_out),
        "nonfinite": {
            c.pair.tensor.hf: {"found": c.nonfinite_found, "expected": c.nonfinite_expected}
            for c in compared
            if c.nonfinite_found or c.nonfinite_expected
        },
        "zero": new_zeros(compared),
        "duplicates": new_duplicates(compared, converted),
        "by_tensor": [
            {
                "hf": c.pair.tensor.hf,
                "name": c.pair.name,
                "shape": list(c.pair.tensor.shape),
                "differing": c.differing,
                "source_crc32c": f"{c.source_crc:08x}",
                "crc32c": f"{c.found_crc:08x}",
            }
            for c in compared
        ],
        "findings": [
            c.to_json() | {"diagnosis": diagnosis.by_tensor.get(c.pair.tensor.hf)}
            for c in differing
        ],
    }


def _changed_in_source(compared: Sequence[Compared], manifest: Manifest) -> list[Compared]:
    """Return the tensors whose bytes in the source are not those that the manifest records."""
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
    """Return who records another checksum of a tensor than it has, and which."""
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
    """Return the difference of a wrong checksum whose values are right."""
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
