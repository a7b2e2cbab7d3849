"""Level logits: outputs of both checkpoints, block by block, against Hugging Face's own model.

Shape suffixes: B batch, T time, D hidden, N real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from golden.compare import (
    LogitsFigures,
    compare_logits,
    over_spread,
    relative_by_token,
    relative_difference,
)
from golden.prompts import DECODED, PADDED, SHORT, Prompt, battery
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.plan import match
from gptj_convert.inspection.json_numbers import json_number, three_digits
from gptj_convert.resources.footprint import logits_memory
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.verification.evidence.verdict import Difference, LevelResult, Verdict
from gptj_model.dtypes import is_lossless
from gptj_model.errors import GptjError
from gptj_model.network.observation import OPERATIONS
from gptj_model.tensors import EMBEDDING, FINAL_NORM, HEAD_WEIGHT, HF_BODY

if TYPE_CHECKING:
    from golden.reference import ReferenceBlock, StreamedReference
    from gptj_model.network.layers import Cache
    from gptj_model.streaming.forward import BlockPass, StreamedModel

LEVEL = "logits"

#: Places outside the blocks where a difference may lie, by the names of Hugging Face's modules.
_OF_EMBEDDING, _OF_NORM, _OF_HEAD = (
    spec.hf.removesuffix(".weight").removeprefix(HF_BODY)
    for spec in (EMBEDDING, FINAL_NORM[0], HEAD_WEIGHT)
)
#: Operation that is named when only a prompt that runs in a special way differs.
_WAYS = {PADDED: "padding", DECODED: "cache"}


@dataclass(slots=True)
class _Followed:
    """One prompt on its way through both models."""

    prompt: Prompt
    found_BTD: np.ndarray
    expected_BTD: np.ndarray
    stages: list[np.ndarray] = field(default_factory=list)
    """|Δ| of each token divided by the standard deviation: for the embedding, then after each
    block; (N,) each."""

    def compare(self) -> float:
        """Add a stage, and return its largest figure."""
        real = self.prompt.real
        self.stages.append(relative_by_token(self.found_BTD[real], self.expected_BTD[real]))
        return float(self.stages[-1].max())


@dataclass(frozen=True, slots=True)
class _Place:
    """Place where a prompt's difference first exceeds the tolerance."""

    block: int | None
    operation: str | None


def compare_outputs(
    checkpoint: Checkpoint, source: Checkpoint, verdict: Verdict, *, thorough: bool
) -> Work[None]:
    """Judge the level, and add it to the verdict.

    Args:
        checkpoint, source: both sides, of one size.
        verdict: verdict that the level is added to.
        thorough: whether to add a prompt of the model's full length.

    Raises:
        GptjError: the reference's logits are NaN or infinite, so nothing can be judged.
    """
    from golden.reference import StreamedReference
    from gptj_model.streaming.forward import StreamedModel

    round_to = common_dtype(checkpoint)
    ours = StreamedModel(checkpoint.config, checkpoint.source, checkpoint.scheme)
    reference = StreamedReference(source.config, source.source, source.scheme, round_to=round_to)
    prompts = battery(source.config, thorough=thorough)
    verdict.plan_memory(logits_memory(source.config, [p.ids.size for p in prompts]))
    pass_ = _Pass(ours, reference, prompts, verdict.tolerance, rounds=_rounds(source, round_to))
    stages = source.config.n_layer + 2
    yield Progress(1, stages, "embedding")
    for i in range(source.config.n_layer):
        pass_.run_block(i)
        yield Progress(i + 2, stages, f"block {i}")
    _judge(pass_.finish(), verdict)
    yield Progress(stages, stages, LEVEL)


def common_dtype(checkpoint: Checkpoint) -> str | None:
    """Return the dtype of all of a checkpoint's tensors; None if there are several."""
    dtypes = {info.dtype for _, _, info in match(checkpoint)}
    return dtypes.pop() if len(dtypes) == 1 else None


def _rounds(source: Checkpoint, round_to: str | None) -> bool:
    """Return whether rounding to a dtype changes values of the source."""
    return round_to is not None and any(
        not is_lossless(info.dtype, round_to) for _, _, info in match(source)
    )


class _Pass:
    """All prompts on their way through both models.

    Args:
        ours, reference: both models, with no block loaded.
        prompts: prompts to run.
        tolerance: largest |Δ| divided by the standard deviation; beyond it the operation is looked
            for.
        rounds: whether the reference rounds its weights; then the effect of that is measured.
    """

    def __init__(
        self,
        ours: StreamedModel,
        reference: StreamedReference,
        prompts: Sequence[Prompt],
        tolerance: float,
        *,
        rounds: bool,
    ) -> None:
        self._ours = ours
        self._reference = reference
        self._tolerance = tolerance
        self.followed = [_Followed(p, ours.embed(p.ids), reference.embed(p.ids)) for p in prompts]
        short = [f for f in self.followed if f.prompt.name in SHORT]
        self._short = short
        self._exact = [f.expected_BTD.astype(np.float64) for f in short]
        """Hidden states of the same prompts in float64."""
        self._unrounded = [reference.embed(f.prompt.ids, rounded=False) for f in short if rounds]
        self.first: _Place | None = None
        """Place where any prompt first exceeds the tolerance."""
        for f in self.followed:
            if not f.compare() <= tolerance:
                self.first = self.first or _Place(None, _OF_EMBEDDING)

    def run_block(self, i: int) -> None:
        """Take every prompt through block `i` on both sides."""
        ours, reference = self._ours.load_block(i), self._reference.load_block(i)
        for f in self.followed:
            before_BTD = f.expected_BTD
            cache = partial(self._ours.empty_cache, *before_BTD.shape[:2])
            f.found_BTD = run_ours(ours, f.found_BTD, f.prompt, cache)
            f.expected_BTD = run_reference(reference, before_BTD, f.prompt)
            if not f.compare() <= self._tolerance and self.first is None:
                self.first = _Place(i, self._operation(ours, reference, before_BTD, f.prompt))
        self._exact = [
            reference.run(x, f.prompt.positions)
            for x, f in zip(self._exact, self._short, strict=True)
        ]
        if self._unrounded:
            unrounded = self._reference.load_block(i, rounded=False)
            self._unrounded = [
                unrounded.run(x, f.prompt.positions)
                for x, f in zip(self._unrounded, self._short, strict=True)
            ]

    def _operation(
        self, ours: BlockPass, reference: ReferenceBlock, x_BTD: np.ndarray, prompt: Prompt
    ) -> str | None:
        """Return the first operation of the block whose result differs for the same input."""
        if prompt.name in _WAYS:
            return _WAYS[prompt.name]
        found = ours.operations(x_BTD, prompt.positions)
        expected = reference.operations(x_BTD, prompt.positions)
        for name in OPERATIONS:
            if not relative_difference(found[name], expected[name]) <= self._tolerance:
                return name
        return None

    def finish(self) -> _Outcome:
        """Return the figures, once all blocks have run."""
        our_head, their_head = self._ours.head(last=True), self._reference.head(last=True)
        states = [f.expected_BTD for f in self.followed]
        ours = our_head.normed([f.found_BTD for f in self.followed])
        theirs = their_head.normed([*states, *self._exact, *self._unrounded])
        count, short = len(states), len(self._short)
        if self.first is None and any(
            not relative_difference(x[f.prompt.real], y[f.prompt.real]) <= self._tolerance
            for x, y, f in zip(ours, theirs, self.followed, strict=False)
        ):
            self.first = _Place(None, _OF_NORM)
        found = our_head.logits(ours)
        expected = their_head.logits(theirs[: count + short])
        unrounded = their_head.logits(theirs[count + short :], rounded=False)
        figures = [
            compare_logits(x[f.prompt.real], y[f.prompt.real])
            for x, y, f in zip(found, expected, self.followed, strict=False)
        ]
        places = [n for n, f in enumerate(self.followed) if f.prompt.name in SHORT]
        exact = expected[count:]
        return _Outcome(
            followed=self.followed,
            figures=figures,
            first=self.first,
            finite=[
                bool(np.isfinite(y[f.prompt.real]).all())
                for y, f in zip(expected, self.followed, strict=False)
            ],
            noise=[_worst(expected[n], x) for n, x in zip(places, exact, strict=True)],
            ours_exact=[_worst(found[n], x) for n, x in zip(places, exact, strict=True)],
            rounding=[_worst(expected[n], x) for n, x in zip(places, unrounded, strict=False)],
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Figures of all prompts."""

    followed: list[_Followed]
    figures: list[LogitsFigures]
    first: _Place | None
    finite: list[bool]
    """Whether the reference's logits of each prompt are finite."""
    noise: list[float]
    """Reference in float32 against itself in float64, for the short prompts."""
    ours_exact: list[float]
    """Our model against the reference in float64."""
    rounding: list[float]
    """Reference with rounded weights against itself without; empty if nothing is rounded."""


def _worst(found_BTV: np.ndarray, expected_BTV: np.ndarray) -> float:
    """Return the largest |Δ| of logits divided by the standard deviation."""
    with np.errstate(invalid="ignore"):
        return relative_difference(found_BTV, expected_BTV)


def run_ours(
    block: BlockPass, x_BTD: np.ndarray, prompt: Prompt, empty_cache: Callable[[], Cache]
) -> np.ndarray:
    """Return a prompt's hidden states after our block, run in the prompt's own way."""
    if not prompt.pieces:
        return block.run(x_BTD, prompt.positions, prompt.real if prompt.padded else None)
    cache, start = empty_cache(), 0
    found = []
    for count in prompt.pieces:
        part = slice(start, start + count)
        out, cache = block.run_cached(x_BTD[:, part], prompt.positions[:, part], cache, start)
        found.append(out)
        start += count
    return np.concatenate(found, axis=1)


def run_reference(block: ReferenceBlock, x_BTD: np.ndarray, prompt: Prompt) -> np.ndarray:
    """Return a prompt's hidden states after the reference's block: all tokens at once, and each
    row with padding by itself, without the padding."""
    if not prompt.padded:
        return block.run(x_BTD, prompt.positions)
    out_BTD = np.zeros_like(x_BTD)
    for row, real_T in enumerate(prompt.real):
        alone = block.run(
            np.ascontiguousarray(x_BTD[row, real_T][None]), prompt.positions[row, real_T][None]
        )
        out_BTD[row, real_T] = alone[0]
    return out_BTD


def _judge(outcome: _Outcome, verdict: Verdict) -> None:
    tolerance = verdict.tolerance
    named = False
    for f, figures, finite in zip(outcome.followed, outcome.figures, outcome.finite, strict=True):
        if not finite:
            raise GptjError(
                f"prompt {f.prompt.name!r}: the original's logits are NaN or infinite, so nothing "
                "can be judged",
                hint="compare bits with `--level weights`; its weights hold NaN or infinite values",
            )
        if figures.relative <= tolerance:
            continue
        place = _Place(_first_block(f, tolerance), None)
        if outcome.first and not named:
            place, named = outcome.first, True
        elif place.block is None:
            place = _Place(None, _OF_HEAD)
        verdict.note(
            Difference(
                LEVEL,
                f"max |Δ| of logits is {figures.relative:.3g} of their standard deviation",
                f"at most {tolerance:g}",
                block=place.block,
                operation=place.operation,
                prompt=f.prompt.name,
            )
        )
    figures = outcome.figures
    verdict.levels[LEVEL] = LevelResult(
        ok=all(x.relative <= tolerance for x in figures),
        figures={
            "max_abs": json_number(max(x.max_abs for x in figures)),
            "relative": json_number(max(x.relative for x in figures)),
            "max_kl": json_number(max(x.max_kl for x in figures)),
            "top1": min(x.top1 for x in figures),
            "top10": min(x.top10 for x in figures),
            "noise_floor": {
                "relative": max(outcome.noise),
                "ours": json_number(max(outcome.ours_exact)),
            },
            "rounding": max(outcome.rounding) if outcome.rounding else None,
            "prompts": [_row(f, x) for f, x in zip(outcome.followed, outcome.figures, strict=True)],
        },
    )


def _first_block(f: _Followed, tolerance: float) -> int | None:
    blocks = f.stages[1:]
    return next((i for i, stage in enumerate(blocks) if not stage.max() <= tolerance), None)


def _row(f: _Followed, figures: LogitsFigures) -> dict[str, Any]:
    return {
        "name": f.prompt.name,
        "tokens": f.prompt.tokens,
        "max_abs": json_number(figures.max_abs),
        "relative": json_number(figures.relative),
        "max_kl": json_number(figures.max_kl),
        "top1": figures.top1,
        "top10": figures.top10,
        "worst_token": figures.worst_token,
        "hidden": three_digits([stage.max() for stage in f.stages[1:]]),
        "positions": f.prompt.positions[f.prompt.real].tolist(),
        "logits_by_token": three_digits(
            [over_spread(float(x), figures.spread) for x in figures.max_abs_N]
        ),
        "kl_by_token": three_digits(figures.kl_N),
        "hidden_by_token": [three_digits(stage) for stage in f.stages[1:]],
    }
