"""Bitwise comparison of every tensor of two checkpoints, at the speed at which both can be read.

Each side is read in its own thread, and a third hashes the files in step with the comparison, so
that their pages are in the page cache. Panels are compared as integers; details are worked out only
for those that differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from crc32c import crc32c

from gptj_convert.checkpoint.match import same_bits
from gptj_convert.inspection.diff import in_step
from gptj_convert.inspection.json_numbers import json_number
from gptj_convert.streams.pipeline import Pipeline
from gptj_convert.streams.prefetch import TensorPrefetch, TensorRequest
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.streams.strips import (
    CONVERTED_STRIP_BUFFERS,
    STRIP_BUFFERS,
    Panels,
    Strip,
    in_panels,
)
from gptj_model.dtypes import NUMPY, count_nonfinite, saturate
from gptj_model.op import Op
from gptj_model.source import TensorInfo, TensorSource, raw_bytes
from gptj_model.tensors import Scheme, Tensor


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor on both sides."""

    tensor: Tensor
    source_name: str
    source: TensorInfo
    name: str
    """Name on the converted side."""
    info: TensorInfo
    """Dtype and shape on the converted side."""
    op: Op
    """Op from the source's layout to the converted one."""
    transposed: bool
    """Whether the converted layout is the transpose of Hugging Face's."""

    @property
    def names(self) -> dict[str, str]:
        """Names of the tensor: {hf, tf, cs}."""
        return {"hf": self.tensor.hf, "tf": self.tensor.tf, "cs": self.tensor.cs[0]}


@dataclass(slots=True)
class Compared:
    """Comparison of a pair. "Expected" is the source, laid out and rounded as the converted side
    is."""

    pair: Pair
    differing: int = 0
    """Number of values whose bits differ."""
    max_abs: float | None = None
    """Largest finite |Δ| of the differing values."""
    first: int | None = None
    """Index of the first differing value, in the order of the converted side."""
    found: Any = None
    """Its value, a numpy scalar of the converted dtype."""
    expected: Any = None
    """Expected value, a numpy scalar of the converted dtype."""
    nonfinite_found: int = 0
    """Number of NaN and infinite values."""
    nonfinite_expected: int = 0
    zero_in_source: bool = True
    zero_found: bool = True
    """Whether all values are zero."""
    source_crc: int = 0
    """crc32c of the source's bytes as they are stored."""
    expected_crc: int = 0
    found_crc: int = 0

    @property
    def index(self) -> list[int] | None:
        """Index of `first` in Hugging Face's order of the axes."""
        if self.first is None:
            return None
        index = [int(i) for i in np.unravel_index(self.first, self.pair.info.shape)]
        return index[::-1] if self.pair.transposed else index

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON object of a pair that differs."""
        return {
            **self.pair.names,
            "values": self.pair.tensor.size,
            "differing": self.differing,
            "max_abs": self.max_abs,
            "first": self.index,
            "found": json_number(self.found),
            "expected": json_number(self.expected),
        }


def pair_up(
    source: Sequence[tuple[Tensor, str, TensorInfo]],
    source_scheme: Scheme,
    converted: Sequence[tuple[Tensor, str, TensorInfo]],
    scheme: Scheme,
) -> list[Pair]:
    """Return the tensors that both sides have in one shape, in the order of the source's table."""
    found = {tensor.hf: (name, info) for tensor, name, info in converted}
    pairs = []
    for tensor, source_name, source_info in source:
        name, info = found.get(tensor.hf, ("", None))
        if info and info.shape == tensor.shape_in(scheme):
            op = tensor.op(source_scheme, scheme)
            transposed = tensor.op(Scheme.HF, scheme) is Op.TRANSPOSE
            pairs.append(Pair(tensor, source_name, source_info, name, info, op, transposed))
    return pairs


def in_file_order(pairs: Sequence[Pair], converted: TensorSource) -> list[Pair]:
    """Return pairs in the order of comparison: the converted file is read from start to end."""
    places = {name: n for n, name in enumerate(converted.tensors)}
    return sorted(pairs, key=lambda p: places[p.name])


def compare_weights(
    pairs: Sequence[Pair],
    source: TensorSource,
    converted: TensorSource,
    *,
    saturated: bool,
    hashing: Iterable[int],
) -> Work[list[Compared]]:
    """Compare every pair; progress is in bytes of the converted side.

    Args:
        pairs: tensors to compare.
        source, converted: both sides.
        saturated: whether values beyond the converted dtype's range are its largest value there.
        hashing: is iterated to its end in its own thread; yields bytes that are done.

    Returns:
        The comparison of each pair, in the order of `pairs`.

    Raises:
        FileFault: a side cannot be read.
    """
    ordered = in_file_order(pairs, converted)
    total, done, hashed = sum(p.info.nbytes for p in pairs), 0, 0
    results = {pair: Compared(pair) for pair in ordered}
    with Pipeline() as pipeline:
        hashes = pipeline.prefetch(hashing, depth=2)
        theirs = TensorPrefetch(
            source,
            [
                TensorRequest(p.source_name, p.op, partial(_look_at_source, results[p]))
                for p in ordered
            ],
            pipeline,
            STRIP_BUFFERS,
        )
        ours = TensorPrefetch(
            converted,
            [TensorRequest(p.name, Op.COPY, partial(_look_at_found, results[p])) for p in ordered],
            pipeline,
            CONVERTED_STRIP_BUFFERS,
        )
        for pair, result in results.items():
            strips = theirs.strips()
            if saturated:
                strips = _saturated(strips, pair.info.dtype)
            expected = in_panels(strips, NUMPY[pair.info.dtype])
            seen = 0
            found = in_panels(ours.strips(), NUMPY[pair.info.dtype])
            for x, y in in_step(expected, found):
                result.expected_crc = crc32c(raw_bytes(x), result.expected_crc)
                bits = f"u{y.itemsize}"
                if not np.array_equal(x.view(bits), y.view(bits)):
                    _work_out(result, x, y, seen)
                seen += y.size
                done += y.nbytes
                while hashed < done and (piece := next(hashes, 0)):
                    hashed += piece
                yield Progress(done, total, pair.tensor.hf)
            result.source_crc, result.found_crc = theirs.crc, ours.crc
            result.nonfinite_expected += result.nonfinite_found
        for _ in hashes:
            pass
    return [results[p] for p in pairs]


def _look_at_source(result: Compared, values: np.ndarray) -> None:
    result.zero_in_source = result.zero_in_source and not values.any()


def _look_at_found(result: Compared, values: np.ndarray) -> None:
    result.zero_found = result.zero_found and not values.any()
    result.nonfinite_found += count_nonfinite(values)


def _saturated(strips: Iterable[Strip], dtype: str) -> Iterator[Strip]:
    for strip in strips:
        saturate(strip.values, dtype)
        yield strip


def _work_out(result: Compared, expected: np.ndarray, found: np.ndarray, seen: int) -> None:
    """Record the differences of two flat pieces that lie `seen` values after the tensor's start."""
    bits = f"u{found.itemsize}"
    unequal = np.flatnonzero(expected.view(bits) != found.view(bits))
    result.differing += unequal.size
    if result.first is None:
        at = int(unequal[0])
        result.first, result.found, result.expected = (
            seen + at,
            found[at].copy(),
            expected[at].copy(),
        )
    result.nonfinite_expected += count_nonfinite(expected) - count_nonfinite(found)
    with np.errstate(invalid="ignore", over="ignore"):
        delta = np.abs(found[unequal].astype(np.float64) - expected[unequal].astype(np.float64))
    delta = delta[np.isfinite(delta)]
    if delta.size:
        result.max_abs = max(result.max_abs or 0.0, float(delta.max()))


def new_zeros(compared: Iterable[Compared]) -> list[str]:
    """Return the HF names of tensors whose values are all zero, but not in the source."""
    return [c.pair.tensor.hf for c in compared if c.zero_found and not c.zero_in_source]


def new_duplicates(compared: Iterable[Compared], converted: TensorSource) -> list[list[str]]:
    """Return the HF names of tensors of one shape that are equal bit for bit, but not in the
    source."""
    alike: dict[tuple[TensorInfo, int], list[Compared]] = {}
    for c in compared:
        if not c.zero_found:
            alike.setdefault((c.pair.info, c.found_crc), []).append(c)
    found = []
    for first, *others in alike.values():
        equal = [
            c
            for c in others
            if (c.pair.source, c.source_crc) != (first.pair.source, first.source_crc)
            and same_bits(*(Panels(converted, x.pair.name, Op.COPY) for x in (first, c)))
        ]
        if equal:
            found.append([c.pair.tensor.hf for c in (first, *equal)])
    return found
