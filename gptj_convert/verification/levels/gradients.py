"""Level gradients: the gradient of the loss for every tensor, against Hugging Face's model.

Both models run forward block by block, keep the input of each block, and run backward through the
blocks, with one block in memory at a time.

Shape suffixes: N tokens, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from golden.compare import over_spread
from golden.prompts import Prompt, labels, training_batch
from golden.tolerances import GRADIENTS_OVER_LOGITS
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.inspection.json_numbers import json_number
from gptj_convert.resources.footprint import gradients_memory
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.verification.evidence.verdict import Difference, LevelResult, Verdict, names
from gptj_convert.verification.levels.logits import common_dtype
from gptj_model.errors import GptjError
from gptj_model.tensors import EMBEDDING, HEAD_WEIGHT, table
from gptj_model.vocabulary import parts

LEVEL = "gradients"


@dataclass(slots=True)
class _Tensor:
    """Figures of one tensor's gradient, added up part by part."""

    max_abs: float = 0.0
    squares: float = 0.0
    size: int = 0

    def add(self, found: np.ndarray, expected: np.ndarray) -> None:
        delta = float(np.abs(found - expected).max(initial=0.0))
        self.max_abs = delta if np.isnan(delta) else max(self.max_abs, delta)
        self.squares += float(np.square(expected, dtype=np.float64).sum())
        self.size += expected.size

    @property
    def relative(self) -> float:
        """Largest |Δ| divided by the root mean square of the reference's gradient."""
        return over_spread(self.max_abs, (self.squares / self.size) ** 0.5)


@dataclass(slots=True)
class _Side:
    """One model in its forward and backward pass."""

    model: Any
    state_BTD: np.ndarray
    """Hidden states in the forward pass, then their gradients in the backward pass."""
    inputs: list[np.ndarray] = field(default_factory=list)
    """Input of each block: (B, T, D)."""
    loss: float = 0.0


def compare_gradients(checkpoint: Checkpoint, source: Checkpoint, verdict: Verdict) -> Work[None]:
    """Judge the level, and add it to the verdict.

    Raises:
        GptjError: the reference's loss is NaN or infinite, so nothing can be judged.
    """
    from golden.reference_gradients import ReferenceGradients
    from gptj_model.streaming.backward import StreamedGradients

    config = source.config
    batch = training_batch(config)
    verdict.plan_memory(gradients_memory(config))
    model = StreamedGradients(checkpoint.config, checkpoint.source, checkpoint.scheme)
    original = ReferenceGradients(
        config, source.source, source.scheme, round_to=common_dtype(checkpoint)
    )
    ours, reference = sides = [_Side(m, m.embed(batch.ids)) for m in (model, original)]
    found = {t.hf: _Tensor() for t in table(config)}
    stages, done = 2 * config.n_layer + 2, 0
    for i in range(config.n_layer):
        for side in sides:
            side.inputs.append(side.state_BTD)
            side.state_BTD = side.model.load_block(i).run(side.state_BTD, batch.positions)
        yield Progress(done := done + 1, stages, f"block {i}")
    _head(sides, batch, found)
    yield Progress(done := done + 1, stages, "head")
    for i in reversed(range(config.n_layer)):
        _block(sides, i, batch, found)
        yield Progress(done := done + 1, stages, f"gradients of block {i}")
    _embedding(sides, batch, found[EMBEDDING.hf])
    _judge(found, ours, reference, config, verdict)
    yield Progress(stages, stages, LEVEL)


def _rows(x_BTD: np.ndarray) -> np.ndarray:
    """Return (B, T, D) as (N, D)."""
    return x_BTD.reshape(-1, x_BTD.shape[-1])


def _head(sides: Sequence[_Side], batch: Prompt, found: dict[str, _Tensor]) -> None:
    """Compute loss, head and final norm; the head a part of the vocabulary at a time."""
    labels_N = labels(batch).reshape(-1)
    states = [_rows(side.state_BTD) for side in sides]
    normed = [side.model.head().normed([x])[0] for side, x in zip(sides, states, strict=True)]
    d_logits = []
    for side, x_ND in zip(sides, normed, strict=True):
        (logits_BTV,) = side.model.head().logits([x_ND[None]])
        side.loss, d_NV = side.model.loss_gradients(logits_BTV[0], labels_N)
        d_logits.append(d_NV)
    d_normed = [np.zeros_like(x) for x in normed]
    config = sides[1].model.config  # our side may share a head that the original has twice
    for start, stop in parts(config):
        gradients = []
        for n, side in enumerate(sides):
            d_part = np.ascontiguousarray(d_logits[n][:, start:stop])
            d_ND, of_weights = side.model.head_gradients(start, stop, normed[n], d_part)
            d_normed[n] += d_ND
            gradients.append(of_weights)
        if config.tie_word_embeddings:
            gradients = [g | {EMBEDDING.hf: g.pop(HEAD_WEIGHT.hf)} for g in gradients]
        _add(found, *gradients)
    gradients = []
    for n, side in enumerate(sides):
        d_ND, of_norm = side.model.final_norm_gradients(states[n], d_normed[n])
        side.state_BTD = d_ND.reshape(side.state_BTD.shape)
        gradients.append(of_norm)
    _add(found, *gradients)


def _block(sides: Sequence[_Side], i: int, batch: Prompt, found: dict[str, _Tensor]) -> None:
    gradients = []
    for side in sides:
        side.model.load_block(i)
        side.state_BTD, of_weights = side.model.block_gradients(
            side.inputs.pop(), batch.positions, side.state_BTD
        )
        gradients.append(of_weights)
    _add(found, *gradients)


def _embedding(sides: Sequence[_Side], batch: Prompt, found: _Tensor) -> None:
    ids_N = batch.ids.reshape(-1)
    (_, x), (_, y) = (
        side.model.embedding_gradients(ids_N, _rows(side.state_BTD)) for side in sides
    )
    found.add(x, y)


def _add(
    found: dict[str, _Tensor], ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> None:
    for name, gradient in expected.items():
        found[name].add(ours[name], gradient)


def _judge(
    found: dict[str, _Tensor],
    ours: _Side,
    reference: _Side,
    config: Any,
    verdict: Verdict,
) -> None:
    if not np.isfinite(reference.loss):
        raise GptjError(
            "the original's loss is NaN or infinite, so nothing can be judged",
            hint="compare bits with `--level weights`; its weights hold NaN or infinite values",
        )
    tolerance = GRADIENTS_OVER_LOGITS * verdict.tolerance
    rows = [
        {"hf": t.hf, "max_abs": json_number(f.max_abs), "relative": json_number(f.relative)}
        for t, f in ((t, found[t.hf]) for t in table(config))
    ]
    beyond = [t for t in table(config) if not found[t.hf].relative <= tolerance]
    # In the backward pass a fault spoils everything before it, so the last tensor is nearest to it.
    for tensor in reversed(beyond):
        verdict.note(
            Difference(
                LEVEL,
                f"max |Δ| of the gradient is {found[tensor.hf].relative:.3g} of its root mean "
                "square",
                f"at most {tolerance:g}",
                tensor=names(tensor),
                block=tensor.block,
            )
        )
    verdict.levels[LEVEL] = LevelResult(
        ok=not beyond,
        figures={
            "relative": json_number(max(f.relative for f in found.values())),
            "tolerance": tolerance,
            "loss": json_number(ours.loss),
            "loss_expected": reference.loss,
            "tensors": rows,
        },
    )
