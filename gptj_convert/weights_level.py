"""Every tensor of two checkpoints, bit for bit, at the speed at which both can be read.

Each side is read in a thread of its own, and the files are hashed in a third, in step with what
is compared, so that the system has their pages at hand. Panels are compared as integers; only
of those that differ anything else is worked out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from crc32c import crc32c

from gptj_convert import panels
from gptj_convert.difference import in_step, json_number
from gptj_convert.panels import CONVERTED_STRIPS, STRIPS, Panels, Strip, Strips, strip_bytes
from gptj_convert.pipeline import Buffers, Pipeline
from gptj_convert.progress import Progress
from gptj_convert.survey import same_bits
from gptj_model.dtypes import NUMPY, count_nonfinite, saturate
from gptj_model.source import TensorInfo, TensorSource, raw_bytes
from gptj_model.tensors import Op, Scheme, Tensor


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
    results: dict[str, Compared] = {}
    with Pipeline() as pipeline:
        hashes = pipeline.ahead(hashing, depth=2)
        theirs = _Side(source, [(p.source_name, p.op) for p in ordered], pipeline, STRIPS)
        ours = _Side(
            converted,
            [(p.name, Op.COPY) for p in ordered],
            pipeline,
            CONVERTED_STRIPS,
            counts=True,
        )
        for pair in ordered:
            result = results[pair.tensor.hf] = Compared(pair)
            expected = _laid_out(pair, theirs.strips(), saturated)
            seen = 0
            for x, y in in_step(expected, (strip.values for strip in ours.strips())):
                result.expected_crc = crc32c(raw_bytes(x), result.expected_crc)
                bits = f"u{y.itemsize}"
                if not np.array_equal(x.view(bits), y.view(bits)):
                    _work_out(result, x, y, seen)
                seen += y.size
                done += y.nbytes
                while hashed < done and (piece := next(hashes, 0)):
                    hashed += piece
                yield Progress(done, total, pair.tensor.hf)
            theirs_now, ours_now = theirs.figures, ours.figures
            result.source_crc, result.zero_in_source = theirs_now.crc, theirs_now.zero
            result.found_crc, result.zero_found = ours_now.crc, ours_now.zero
            result.nonfinite_found = ours_now.nonfinite
            result.nonfinite_expected += ours_now.nonfinite
        for _ in hashes:
            pass
    compared += (results[p.tensor.hf] for p in pairs)


@dataclass(slots=True)
class _Figures:
    """Of one tensor, as its side has it."""

    crc: int = 0
    zero: bool = True
    """Whether all its values are zero."""
    nonfinite: int = 0
    """How many are NaN or infinite, if that is counted."""


class _Side:
    """Tensors read ahead, one after the other, in a thread of their own.

    Attributes:
        figures: of the tensor whose strips were taken last.
    """

    def __init__(
        self,
        source: TensorSource,
        wanted: Sequence[tuple[str, Op]],
        pipeline: Pipeline,
        count: int,
        *,
        counts: bool = False,
    ) -> None:
        sizes = (strip_bytes(source.tensors[name], op) for name, op in wanted)
        self._buffers = Buffers(pipeline, count, max(sizes, default=0))
        self._ahead = pipeline.ahead(self._read(source, wanted), depth=count - 1)
        self._counts = counts
        self.figures = _Figures()

    def strips(self) -> Iterator[Strip]:
        """Those of the next tensor; each holds until the next is asked for."""
        for item in self._ahead:
            if isinstance(item, _Figures):
                self.figures = item
                return
            strip, memory = item
            yield strip
            self._buffers.give(memory)

    def _read(
        self, source: TensorSource, wanted: Sequence[tuple[str, Op]]
    ) -> Iterator[tuple[Strip, np.ndarray] | _Figures]:
        """Strips with their memory; after those of a tensor its figures."""
        for name, op in wanted:
            figures = _Figures()
            memory = np.empty(0, np.uint8)

            def take(size: int) -> np.ndarray:
                nonlocal memory
                memory = self._buffers.take()
                return memory

            def look(values: np.ndarray, figures: _Figures = figures) -> None:
                figures.zero = figures.zero and not values.any()
                if self._counts:
                    figures.nonfinite += count_nonfinite(values)

            strips = Strips(source, name, op, buffer=take, look=look)
            for strip in strips:
                yield strip, memory
            figures.crc = strips.crc
            yield figures


def _laid_out(pair: Pair, strips: Iterable[Strip], saturated: bool) -> Iterator[np.ndarray]:
    """Flat pieces of what the converted side must hold; each until the next is asked for."""
    dtype = NUMPY[pair.info.dtype]
    step = max(1, panels.PANEL_BYTES // dtype.itemsize)
    memory = np.empty(0, dtype)
    for strip in strips:
        if saturated:
            saturate(strip.values, pair.info.dtype)
        if strip.op is Op.COPY and strip.values.dtype == dtype:
            yield strip.values.reshape(-1)
            continue
        if not memory.size:
            memory = np.empty(min(step, pair.tensor.size), dtype)
        for begin in range(0, strip.values.size, step):
            part = memory[: min(step, strip.values.size - begin)]
            with np.errstate(over="ignore", invalid="ignore"):
                strip.fill(part, begin)
            yield part


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
