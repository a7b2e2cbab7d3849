"""Self-test of verification: faults planted in memory into a checkpoint, each of which must be
found.

Nothing is written. Every fault is first looked for as level structure or weights does, then by the
model's outputs: how far the logits exceed the tolerance shows whether level logits alone would have
found it, and so what a tolerance can tell on this checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from golden.compare import relative_difference
from golden.prompts import Prompt, short
from golden.reference import ReferenceBlock, StreamedReference
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.plan import match
from gptj_convert.inspection.json_numbers import json_number
from gptj_convert.streams.progress import Progress, Work, finish
from gptj_convert.verification.evidence.bitwise import Compared, compare_weights, pair_up
from gptj_convert.verification.levels.logits import common_dtype
from gptj_convert.verification.planted_faults import (
    FaultySource,
    PlantedFault,
    damaged_stages,
    planted_faults,
    reading,
)
from gptj_model.config import differing_fields
from gptj_model.streaming.forward import BlockPass, HeadPass, StreamedModel

_Streamed = StreamedModel | StreamedReference


@dataclass(slots=True)
class Planted:
    """One fault, and how it was found."""

    what: str
    caught_by: str | None
    """Level that finds it first; None if none does."""
    named: str | None
    """HF name of the first tensor, or the field, that is named."""
    relative: float
    """Largest |Δ| of logits over their standard deviation."""
    margin: float
    """`relative` divided by the tolerance: above 1, level logits alone finds the fault."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON object."""
        return asdict(self) | {
            "relative": json_number(self.relative),
            "margin": json_number(self.margin),
        }


@dataclass(slots=True)
class SelfTest:
    """Outcome of a self-test."""

    tolerance: float
    planted: list[Planted]
    floor: float = float("nan")
    """Difference of the sound checkpoint itself, which a tolerance must exceed."""

    @property
    def ok(self) -> bool:
        """Whether the sound checkpoint passes and every fault is caught."""
        caught = all(fault.caught_by for fault in self.planted)
        return self.floor <= self.tolerance and caught and bool(self.planted)

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON object."""
        return {
            "floor": json_number(self.floor),
            "tolerance": self.tolerance,
            "faults": [fault.to_json() for fault in self.planted],
        }


def self_test(checkpoint: Checkpoint, source: Checkpoint, tolerance: float) -> Work[SelfTest]:
    """Plant every fault into `checkpoint`, and find each by comparing with `source`.

    Args:
        checkpoint, source: two sound checkpoints, which may be the same.
        tolerance: largest |Δ| of logits over their standard deviation that passes.

    Raises:
        FileFault: a side cannot be read.
    """
    result = SelfTest(tolerance, [])
    config = checkpoint.config
    faults = [f for f in planted_faults(config) if f.fields or _changes(f, checkpoint)]
    stages = 2 * len(faults) + config.n_layer + 2
    caught = []
    for n, fault in enumerate(faults, start=1):
        caught.append(_caught(fault, checkpoint, source))
        yield Progress(n, stages, fault.what)
    run = _Run(checkpoint, source, [f for f in faults if not f.fields])
    for i in range(config.n_layer):
        run.block(i)
        yield Progress(len(faults) + i + 1, stages, f"block {i}")
    result.floor, of_tensors = run.finish()
    figures = iter(of_tensors)
    for n, (fault, (level, named)) in enumerate(zip(faults, caught, strict=True), start=1):
        relative = run.with_config(fault) if fault.fields else next(figures)
        if level is None and relative > result.tolerance:
            level = "logits"
        margin = relative / result.tolerance
        result.planted.append(Planted(fault.what, level, named, relative, margin))
        yield Progress(len(faults) + config.n_layer + 1 + n, stages, fault.what)
    return result


def _faulty(fault: PlantedFault, checkpoint: Checkpoint) -> FaultySource:
    return FaultySource(checkpoint.source, checkpoint.scheme, checkpoint.config, fault)


def _changes(fault: PlantedFault, checkpoint: Checkpoint) -> bool:
    """Return whether the fault changes anything here: a bias of zeros, say, cannot be zeroed."""
    return any(c.differing for c in _compared(fault, checkpoint, checkpoint))


def _caught(
    fault: PlantedFault, checkpoint: Checkpoint, source: Checkpoint
) -> tuple[str | None, str | None]:
    """Return the level that finds the fault without running a model, and what it names."""
    if fault.fields:
        changed = replace(checkpoint.config, **fault.fields)
        differing = list(differing_fields(changed, source.config))
        return ("structure", differing[0]) if differing else (None, None)
    for c in _compared(fault, checkpoint, source):
        if c.differing:
            return "weights", c.pair.tensor.hf
    return None, None


def _compared(fault: PlantedFault, checkpoint: Checkpoint, source: Checkpoint) -> list[Compared]:
    """Return the fault's tensors as level weights compares them."""
    faulty = _faulty(fault, checkpoint)
    pairs = pair_up(
        [(t, name, info) for t, name, info in match(source) if t.hf in fault.tensors],
        source.scheme,
        match(checkpoint),
        checkpoint.scheme,
    )
    work = compare_weights(pairs, source.source, faulty, saturated=False, hashing=())
    return finish(work)


class _Run:
    """The short prompts through the source, through the sound checkpoint, and through it with each
    fault."""

    def __init__(
        self, checkpoint: Checkpoint, source: Checkpoint, faults: list[PlantedFault]
    ) -> None:
        self._checkpoint = checkpoint
        self._prompts = short(checkpoint.config)
        self._sources = [_faulty(fault, checkpoint) for fault in faults]
        self._stages = [damaged_stages(checkpoint.config, fault) for fault in faults]
        self._original = StreamedReference(
            source.config, source.source, source.scheme, round_to=common_dtype(checkpoint)
        )
        self._model = _model(checkpoint)
        self._expected = _embed(self._original, self._prompts)
        self._sound = _embed(self._model, self._prompts)
        self._faulty = []
        for n, stages in enumerate(self._stages):
            with self._with(n, "embedding" in stages):
                self._faulty.append(_embed(self._model, self._prompts))
        self._logits: list[np.ndarray] = []

    def block(self, i: int) -> None:
        """Take all of them through block `i`."""
        original = self._original.load_block(i)
        self._expected = _run(original, self._expected, self._prompts)
        sound = self._model.load_block(i)
        self._sound = _run(sound, self._sound, self._prompts)
        for n, stages in enumerate(self._stages):
            if i not in stages:
                self._faulty[n] = _run(sound, self._faulty[n], self._prompts)
        for n, stages in enumerate(self._stages):
            if i in stages:
                with self._with(n, True):
                    faulty = self._model.load_block(i)
                self._faulty[n] = _run(faulty, self._faulty[n], self._prompts)

    def finish(self) -> tuple[float, list[float]]:
        """Return the largest difference of the sound checkpoint, and of each fault."""
        self._logits = _logits(self._original.head(last=True), self._expected)
        head = self._model.head(last=True)
        floor = _worst(_logits(head, self._sound), self._logits)
        found = []
        for n, stages in enumerate(self._stages):
            with self._with(n, "head" in stages):
                found.append(_worst(_logits(head, self._faulty[n]), self._logits))
        return floor, found

    def with_config(self, fault: PlantedFault) -> float:
        """Return the largest difference of the checkpoint with another config; call it after
        `finish`."""
        changed = replace(self._checkpoint, config=replace(self._checkpoint.config, **fault.fields))
        model = _model(changed)
        states = _embed(model, self._prompts)
        for i in range(changed.config.n_layer):
            states = _run(model.load_block(i), states, self._prompts)
        return _worst(_logits(model.head(last=True), states), self._logits)

    def _with(self, n: int, damaged: bool):
        source = self._sources[n] if damaged else self._checkpoint.source
        return reading(self._model, source)


def _model(checkpoint: Checkpoint) -> StreamedModel:
    return StreamedModel(checkpoint.config, checkpoint.source, checkpoint.scheme)


def _embed(model: _Streamed, prompts: list[Prompt]) -> list[np.ndarray]:
    return [model.embed(p.ids) for p in prompts]


def _run(
    block: BlockPass | ReferenceBlock, states: list[np.ndarray], prompts: list[Prompt]
) -> list[np.ndarray]:
    return [block.run(x, p.positions) for x, p in zip(states, prompts, strict=True)]


def _logits(head: HeadPass | StreamedReference, states: list[np.ndarray]) -> list[np.ndarray]:
    return head.logits(head.normed(states))


def _worst(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    with np.errstate(invalid="ignore"):
        return max(relative_difference(x, y) for x, y in zip(found, expected, strict=True))
