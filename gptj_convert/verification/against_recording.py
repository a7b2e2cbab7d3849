"""Verification of a converted checkpoint against a recording of its original, without PyTorch and
without the original.

The levels are structure, weights and logits. A recording shows which tensor differs and the first
block that differs, but neither which value nor which operation.

Shape suffixes: T time, D hidden, N kept tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from golden.compare import compare_logits, relative_difference
from golden.recording import Recording
from gptj_convert.checkpoint.open import Checkpoint, open_checkpoint
from gptj_convert.conversion.plan import match
from gptj_convert.inspection.json_numbers import json_number, three_digits
from gptj_convert.options import levels_up_to
from gptj_convert.resources.footprint import logits_memory
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.verification.evidence.verdict import Difference, LevelResult, Verdict, names
from gptj_convert.verification.levels.structure import config_differences
from gptj_convert.verification.recording import checksum
from gptj_model.dtypes import is_lossless
from gptj_model.errors import ConfigError, FileFault, GptjError, TensorFault
from gptj_model.streaming.forward import StreamedModel


def verify_against_recording(
    converted: Path,
    recording: Recording,
    *,
    tolerance: float,
    level: str,
    config_file: Path | None = None,
) -> Work[Verdict]:
    """Judge a converted checkpoint by a recording of its original, and return the verdict.

    Args:
        converted: checkpoint to judge.
        recording: outputs of the original, and checksums of its weights.
        tolerance: largest |Δ| of logits over their standard deviation that passes.
        level: last level to run, one of `RECORDED_LEVELS`.
        config_file: configuration of a checkpoint that has none beside it.

    Raises:
        GptjError: the recording is of weights that the converted dtype cannot hold.
    """
    verdict = Verdict(tolerance, levels_up_to(level))
    result = verdict.levels["structure"] = LevelResult(ok=False)
    try:
        checkpoint = open_checkpoint(converted, config_file=config_file)
    except (FileFault, ConfigError, TensorFault) as e:
        verdict.note(Difference("structure", e.message, "a whole checkpoint"))
        return verdict
    with checkpoint:
        try:
            matched = match(checkpoint)
        except TensorFault as e:
            verdict.note(Difference("structure", "; ".join(e.problems), "the original's tensors"))
            return verdict
        if differing := config_differences(checkpoint.config, recording.config):
            verdict.note(Difference("structure", *differing))
            return verdict
        result.ok = True
        result.figures = {"tensors": len(matched), "recording": recording.made_by}
        if "weights" in verdict.asked:
            yield from _weights(checkpoint, recording, verdict)
        if "logits" in verdict.asked and not verdict.differences:
            yield from _logits(checkpoint, recording, verdict)
    return verdict


def _weights(checkpoint: Checkpoint, recording: Recording, verdict: Verdict) -> Work[None]:
    matched = match(checkpoint)
    differing = []
    for n, (tensor, name, info) in enumerate(matched, start=1):
        stated = recording.weights.get(tensor.hf, {}).get(info.dtype)
        found = checksum(tensor, checkpoint.source, name, checkpoint.scheme, info.dtype)
        if found != stated:
            differing.append(tensor.hf)
            verdict.note(
                Difference(
                    "weights",
                    f"crc32c {found} of the values",
                    f"{stated or 'none'}, as recorded",
                    tensor=names(tensor),
                )
            )
        yield Progress(n, len(matched), tensor.hf)
    verdict.levels["weights"] = LevelResult(
        not differing, {"tensors": len(matched), "differing": len(differing)}
    )


def _logits(checkpoint: Checkpoint, recording: Recording, verdict: Verdict) -> Work[None]:
    _refuse_rounding(checkpoint, recording)
    config, tolerance = recording.config, verdict.tolerance
    recorded = recording.prompts
    verdict.plan_memory(logits_memory(config, [r.prompt.tokens for r in recorded]))
    model = StreamedModel(checkpoint.config, checkpoint.source, checkpoint.scheme)
    states = [model.embed(r.prompt.ids) for r in recorded]
    hidden: list[list[float]] = [[] for _ in recorded]
    for i in range(config.n_layer):
        block = model.load_block(i)
        for n, r in enumerate(recorded):
            states[n] = block.run(states[n], r.prompt.positions)
            if r.hidden is not None:
                hidden[n].append(relative_difference(states[n][0], r.hidden[i]))
        yield Progress(i + 1, config.n_layer + 1, f"block {i}")
    kept = [np.ascontiguousarray(x[:, r.kept]) for x, r in zip(states, recorded, strict=True)]
    head = model.head(last=True)
    found = head.logits(head.normed(kept))
    differing = min((_first(h, tolerance) for h in hidden if h), default=None)
    rows: list[dict[str, Any]] = []
    for r, logits_BTV, of_blocks in zip(recorded, found, hidden, strict=True):
        figures = compare_logits(logits_BTV[0], r.logits)
        rows.append(
            {
                "name": r.prompt.name,
                "tokens": len(r.kept),
                "max_abs": json_number(figures.max_abs),
                "relative": json_number(figures.relative),
                "max_kl": json_number(figures.max_kl),
                "top1": figures.top1,
                "top10": figures.top10,
                "hidden": three_digits(of_blocks),
            }
        )
        if not figures.relative <= tolerance:
            verdict.note(
                Difference(
                    "logits",
                    f"max |Δ| of logits is {figures.relative:.3g} of their standard deviation",
                    f"at most {tolerance:g}",
                    block=None if differing == config.n_layer else differing,
                    prompt=r.prompt.name,
                )
            )
    verdict.levels["logits"] = LevelResult(
        not verdict.differences,
        {
            "max_abs": max(row["max_abs"] for row in rows),
            "relative": max(row["relative"] for row in rows),
            "max_kl": max(row["max_kl"] for row in rows),
            "top1": min(row["top1"] for row in rows),
            "top10": min(row["top10"] for row in rows),
            "prompts": rows,
        },
    )
    yield Progress(config.n_layer + 1, config.n_layer + 1, "logits")


def _refuse_rounding(checkpoint: Checkpoint, recording: Recording) -> None:
    """Raise a GptjError if the converted dtype cannot hold the recorded weights."""
    for _, _, info in match(checkpoint):
        if not is_lossless(recording.dtype, info.dtype):
            raise GptjError(
                f"the recording is of {recording.dtype} weights, which {info.dtype} cannot hold: "
                "the rounding would be judged, not the conversion",
                hint=f"record the original with `--dtype {info.dtype}`, or compare every value "
                "as it is with `--level weights`",
            )


def _first(of_blocks: list[float], tolerance: float) -> int:
    """Return the first block beyond the tolerance; the number of blocks if there is none."""
    return next((i for i, d in enumerate(of_blocks) if not d <= tolerance), len(of_blocks))
