"""Differences between two checkpoints of any formats: in config, in structure, and value by value.

Both are read piece by piece through the table, in the order of the second one's file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from gptj_convert.checkpoint.match import Finding, Role, settle_copies
from gptj_convert.inspection.inspect import Inspection, Statistics
from gptj_convert.inspection.json_numbers import json_number
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.streams.strips import Panels
from gptj_model.config import NOT_COMPUTED, differing_fields
from gptj_model.dtypes import FLOATS, NUMPY
from gptj_model.errors import ConfigError
from gptj_model.op import Op
from gptj_model.tensors import Scheme

#: Roles of tensors that are compared; the others are not part of the model.
_COMPARED = (Role.WEIGHT, Role.UNKNOWN)


class Outcome(Enum):
    """Outcome of a comparison, from best to worst."""

    IDENTICAL = "identical"
    """Same bits."""
    EQUAL = "equal"
    """Same values in another dtype, or with other signs of zeros or kinds of NaN."""
    ROUNDED = "rounded"
    """One side equals the other, rounded to its dtype."""
    DIFFERENT = "different"


@dataclass(slots=True)
class TensorComparison:
    """One tensor on both sides. Pairs are (of the first checkpoint, of the second)."""

    name: str
    """HF name; for a tensor outside the table, its name in the file."""
    dtypes: tuple[str | None, str | None]
    """Dtypes; None on a side that lacks the tensor."""
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    """Shapes in HF order."""
    outcome: Outcome = Outcome.DIFFERENT
    values: int = 0
    """Number of values that were compared."""
    differing: int = 0
    """Number of values that differ. NaN equals NaN."""
    nonfinite: int = 0
    """Number of differing values that are NaN or infinite on a side."""
    max_abs: float | None = None
    """Largest |Δ| of the differing values that are finite on both sides."""
    relative: float | None = None
    """`max_abs` divided by the standard deviation of the second checkpoint's finite values."""
    first: list[int] | None = None
    """Index in HF order of the value that differs first in the order of the second file."""
    first_values: tuple[float | str, float | str] | None = None
    """Both values there; what JSON has no number for is "nan", "inf" or "-inf"."""
    rounded: str | None = None
    """The side that equals the other one rounded: "path", the first, or "other"."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON object."""
        return asdict(self) | {"outcome": self.outcome.value}


@dataclass(slots=True)
class Comparison:
    """Comparison of two checkpoints. Pairs are as in `TensorComparison`."""

    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Fields of the config that differ."""
    tensors: list[TensorComparison] = field(default_factory=list)
    not_compared: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    """Number of tensors that are not part of the model, by role."""

    @property
    def outcome(self) -> Outcome:
        """Worst outcome of all tensors; a config that computes differently counts as a
        difference."""
        if self.config.keys() - NOT_COMPUTED:
            return Outcome.DIFFERENT
        order = list(Outcome)
        return max((t.outcome for t in self.tensors), key=order.index, default=Outcome.IDENTICAL)

    def counts(self) -> dict[str, int]:
        """Return the number of tensors by outcome."""
        found = Counter(t.outcome for t in self.tensors)
        return {outcome.value: found[outcome] for outcome in Outcome}

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON object; identical tensors are only counted."""
        return {
            "outcome": self.outcome.value,
            "config": self.config,
            "counts": self.counts(),
            "tensors": [t.to_json() for t in self.tensors if t.outcome is not Outcome.IDENTICAL],
            "not_compared": self.not_compared,
        }


def compare(first: Inspection, second: Inspection) -> Work[Comparison]:
    """Compare two checkpoints tensor by tensor; progress is in bytes of the first.

    Raises:
        ConfigError: names cannot be matched, because a side has no config.
        FileFault: a side is cut short, or a device fails.
    """
    result = Comparison()
    sides = (first, second)
    for side in sides:
        if side.config_fault:
            raise ConfigError(side.config_fault.message, hint=side.hint)
    assert first.config
    assert second.config
    result.config = differing_fields(first.config, second.config)
    tables = []
    for side, others in zip(sides, result.not_compared, strict=True):
        findings = [f for f in settle_copies(side.findings, side.source) if f.info]
        tables.append({_key(f): f for f in findings if f.role in _COMPARED})
        others.update(Counter(f.role.value for f in findings if f.role not in _COMPARED))
    ours, theirs = tables
    total = sum(f.info.nbytes for f in ours.values() if f.info)
    done = 0
    for key in ours | theirs:
        a, b = ours.get(key), theirs.get(key)
        tensor = TensorComparison(
            key[1],
            dtypes=(a and a.info and a.info.dtype, b and b.info and b.info.dtype),
            shapes=(a and _hf_shape(a, first.scheme), b and _hf_shape(b, second.scheme)),
        )
        result.tensors.append(tensor)
        if a and b and tensor.shapes[0] == tensor.shapes[1]:
            for size in _compare_values(tensor, first, a, second, b):
                yield Progress(done := done + size, total, tensor.name)
    return result


def _key(finding: Finding) -> tuple[bool, str]:
    """Return the key that finds a tensor on the other side; no stray name is taken for a row's."""
    return (True, finding.tensor.hf) if finding.tensor else (False, finding.name)


def _hf_shape(finding: Finding, scheme: Scheme) -> tuple[int, ...]:
    assert finding.info
    return _op(finding, scheme, Scheme.HF).shape(finding.info.shape)


def _op(finding: Finding, source: Scheme, target: Scheme) -> Op:
    """Return the op between two layouts; COPY for a tensor that is no matrix although its row
    is."""
    matrix = finding.info and len(finding.info.shape) == 2
    return finding.tensor.op(source, target) if finding.tensor and matrix else Op.COPY


def _compare_values(
    result: TensorComparison, first: Inspection, a: Finding, second: Inspection, b: Finding
) -> Iterator[int]:
    """Fill `result`; yield the number of bytes of `first` that are done."""
    assert a.info
    assert b.info
    judge = _Judge(a.info.dtype, b.info.dtype)
    panels = Panels(first.source, a.name, _op(a, first.scheme, second.scheme))
    for x, y in in_step(panels, Panels(second.source, b.name, Op.COPY)):
        judge.add(x, y)
        yield x.nbytes
    result.outcome = judge.outcome
    result.values, result.differing, result.nonfinite = judge.seen, judge.differing, judge.nonfinite
    if judge.first is None:
        return
    result.rounded = judge.rounded
    index = [int(i) for i in np.unravel_index(judge.first, b.info.shape)]
    result.first = index[::-1] if _op(b, second.scheme, Scheme.HF) is Op.TRANSPOSE else index
    result.first_values = judge.first_values
    result.max_abs = judge.max_abs
    spread = Statistics()
    for values in Panels(second.source, b.name, Op.COPY):
        spread.add(values)
    if result.max_abs is not None and spread.std:
        result.relative = result.max_abs / spread.std


def in_step(
    a: Iterable[np.ndarray], b: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield flat pieces of equal sizes from two streams of pieces whose sizes add up to the
    same."""
    pieces, others = iter(a), iter(b)
    x = y = np.empty(0)
    while True:
        if not x.size:
            x = next(pieces, x).reshape(-1)
        if not y.size:
            y = next(others, y).reshape(-1)
        size = min(x.size, y.size)
        if not size:
            return
        yield x[:size], y[:size]
        x, y = x[size:], y[size:]


class _Judge:
    """Comparison of values of two dtypes, added piece by piece."""

    def __init__(self, a: str, b: str) -> None:
        self._dtypes = NUMPY[a], NUMPY[b]
        self._common = _common(a, b)
        self._same_dtype = a == b
        self._same_bits = a == b
        #: Whether each side may still equal the other one, rounded.
        self._rounded = [a != b and {a, b} <= FLOATS.keys()] * 2
        self.seen = self.differing = self.nonfinite = 0
        self.max_abs: float | None = None
        self.first: int | None = None
        self.first_values: tuple[float | str, float | str] | None = None

    @property
    def outcome(self) -> Outcome:
        """Outcome of all values so far."""
        if self._same_bits:
            return Outcome.IDENTICAL
        if not self.differing:
            return Outcome.EQUAL
        return Outcome.ROUNDED if self.rounded else Outcome.DIFFERENT

    @property
    def rounded(self) -> str | None:
        """Side that may still equal the other one, rounded."""
        sides = zip(("path", "other"), self._rounded, strict=True)
        return next((side for side, may in sides if may), None)

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Compare two flat pieces of the same size."""
        bits = f"u{a.itemsize}"
        if not (self._same_dtype and np.array_equal(a.view(bits), b.view(bits))):
            self._same_bits = False
            with np.errstate(over="ignore", invalid="ignore"):
                self._compare(a, b)
        self.seen += a.size

    def _compare(self, a: np.ndarray, b: np.ndarray) -> None:
        x, y = a.astype(self._common, copy=False), b.astype(self._common, copy=False)
        unequal = np.flatnonzero(_unequal(x, y))
        if not unequal.size:
            return
        self.differing += unequal.size
        x, y = x[unequal], y[unequal]
        if self.first is None:
            self.first = self.seen + int(unequal[0])
            self.first_values = json_number(x[0]), json_number(y[0])
        for side, (mine, other) in enumerate(((x, y), (y, x))):
            if self._rounded[side]:
                rounded = other.astype(self._dtypes[side]).astype(self._common)
                self._rounded[side] = not _unequal(mine, rounded).any()
        delta = np.abs(x.astype(np.float64) - y.astype(np.float64))
        finite = delta[np.isfinite(delta)]
        self.nonfinite += delta.size - finite.size
        if finite.size:
            self.max_abs = max(self.max_abs or 0.0, float(finite.max()))


def _common(a: str, b: str) -> np.dtype:
    """Return a dtype that holds every value of both, the wider one where possible."""
    if a == b:
        return NUMPY[a]
    narrow = {"float32", "float16", "bfloat16"}
    return NUMPY["float32" if {a, b} <= narrow else "float64"]


def _unequal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return where values differ; NaN equals NaN."""
    return (a != b) & ((a == a) | (b == b))
