"""Every tensor of two checkpoints, bit for bit, at the speed at which both can be read.

Each side is read in a thread of its own, and the files are hashed in a third, in step with what
is compared, so that the system has their pages at hand. Panels are compared as integers; only
of those that differ anything else is worked out.
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
from gptj_convert.streams.progress import Progress
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
    """One tensor, on both sides."""

    tensor: Tensor
    source_name: str
    source: TensorInfo
    name: str
    """On the converted side."""
    info: TensorInfo
    """On the converted side."""
    op: Op
    """From the source's layout to the converted one."""
    transposed: bool
    """Whether the converted side's layout is the transpose of Hugging Face's."""

    @property
    def names(self) -> dict[str, str]:
        """{hf, tf, cs}."""
        return {"hf": self.tensor.hf, "tf": self.tensor.tf, "cs": self.tensor.cs[0]}


@dataclass(slots=True)
class Compared:
    """A pair, compared. "Expected" is the source, laid out and rounded as the other side is."""

    pair: Pair
    differing: int = 0
    """Values whose bits differ."""
    max_abs: float | None = None
    """The largest |Δ| of those that is finite."""
    first: int | None = None
    """Place of the first of them, in the order of the converted side."""
    found: Any = None
    """Its value, a numpy scalar of the converted dtype."""
    expected: Any = None
    """What it must be; the same."""
    nonfinite_found: int = 0
    """NaN and infinite values."""
    nonfinite_expected: int = 0
    zero_in_source: bool = True
    zero_found: bool = True
    """Whether all values are zero."""
    source_crc: int = 0
    """crc32c of the source's bytes, as they are there."""
    expected_crc: int = 0
    found_crc: int = 0

    @property
    def index(self) -> list[int] | None:
        """Where `first` is, in Hugging Face's order of the axes."""
        if self.first is None:
            return None
        index = [int(i) for i in np.unravel_index(self.first, self.pair.info.shape)]
        return index[::-1] if self.pair.transposed else index

    def to_json(self) -> dict[str, Any]:
        """The fields of the JSON object; of a pair that differs."""
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
    """The tensors that both sides have in one shape, in the order of the source's table."""
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
    """The order in which they are compared: the converted file is read from its beginning on."""
    places = {name: n for n, name in enumerate(converted.tensors)}
    return sorted(pairs, key=lambda p: places[p.name])


def compare_weights(
    pairs: Sequence[Pair],
    source: TensorSource,
    converted: TensorSource,
    compared: list[Compared],
    *,
    saturated: bool,
    hashing: Iterable[int],
) -> Iterator[Progress]:
    """Compare every pair, yielding progress in bytes of the converted side.

    Args:
        pairs: what is compared.
        source, converted: the sides.
        compared: is filled, in the order of `pairs`.
        saturated: whether values beyond the converted dtype's range are its largest there.
        hashing: is gone through in a thread of its own, to the end; yields bytes that are done.

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
    compared += (results[p] for p in pairs)


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
    """Count in flat pieces that differ, `seen` values from the tensor's beginning."""
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
    """HF names of tensors whose values are all zero, but not in the source."""
    return [c.pair.tensor.hf for c in compared if c.zero_found and not c.zero_in_source]


def new_duplicates(compared: Iterable[Compared], converted: TensorSource) -> list[list[str]]:
    """HF names of tensors of one shape that are equal bit for bit, but not in the source."""
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
