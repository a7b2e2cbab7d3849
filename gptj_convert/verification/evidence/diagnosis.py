"""Diagnosis of a converted checkpoint that differs from its source, in words.

Each hypothesis about the differences is tested, and none is stated that does not hold for every
value. Checksums from the comparison show first which tensor is another one. Then both sides of
single tensors are read again: their values, then their rows and columns by a hash of each.

Rows and columns are those of Hugging Face's layout, (out, in).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from gptj_convert.inspection.diff import in_step
from gptj_convert.streams.strips import Panels
from gptj_convert.verification.evidence.bitwise import Compared, Pair
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import FLOATS, NUMPY
from gptj_model.op import Op
from gptj_model.source import TensorSource

#: Bytes of tensors that are read again; beyond them, only checksums are used.
_BUDGET = 4 * 2**30
#: Largest number of rows by which rows may have shifted together.
_SHIFTS = 8

_ANOTHER = "no tensor is the source's: these are the weights of another model or revision"


@dataclass(slots=True)
class Diagnosis:
    """Findings about the differences."""

    by_tensor: dict[str, str] = field(default_factory=dict)
    """Findings by HF name."""
    summary: list[str] = field(default_factory=list)
    """Every cause once."""


def diagnose(
    compared: Sequence[Compared], source: TensorSource, converted: TensorSource, config: GPTJConfig
) -> Diagnosis:
    """Test hypotheses about the tensors that differ.

    Args:
        compared: comparison of every tensor.
        source, converted: both sides.
        config: configuration of the source.

    Raises:
        FileFault: a side cannot be read.
    """
    result = Diagnosis()
    wrong = [c for c in compared if c.differing]
    exchanged = _exchanged_tensors(compared) | _exchanged_blocks(compared)
    alone: dict[str, list[str]] = defaultdict(list)
    left = _BUDGET
    for c in wrong:
        hf = c.pair.tensor.hf
        if hf in exchanged and not c.zero_found:
            result.by_tensor[hf] = exchanged[hf]
            continue
        sides = _Sides(c.pair, source, converted)
        text = _from_figures(c)
        if not text and c.pair.info.nbytes <= left:
            left -= c.pair.info.nbytes
            text = _by_reading(c, sides, config)
        if text:
            result.by_tensor[hf] = text
            alone[text].append(hf)
    result.summary += dict.fromkeys(t for t in exchanged.values() if t in result.by_tensor.values())
    for text, names in alone.items():
        of = names[0] if len(names) == 1 else f"{len(names)} tensors, {names[0]} first"
        result.summary.append(f"{of}: {text}")
    if len(wrong) == len(compared) > 1 and not result.by_tensor:
        result.by_tensor = {c.pair.tensor.hf: _ANOTHER for c in wrong}
        result.summary.append(_ANOTHER)
    return result


# Tests on the checksums of both sides.


def _key(c: Compared, crc: int) -> tuple[str, tuple[int, ...], int]:
    return c.pair.info.dtype, c.pair.info.shape, crc


def _row(c: Compared) -> str:
    """Return the row of the table, whatever the block."""
    return c.pair.tensor.hf.replace(f".{c.pair.tensor.block}.", ".")


def _exchanged_blocks(compared: Sequence[Compared]) -> dict[str, str]:
    """Return findings, by HF name, of whole blocks that are another block of the source."""
    blocks: dict[int, list[Compared]] = defaultdict(list)
    for c in compared:
        if c.pair.tensor.block is not None:
            blocks[c.pair.tensor.block].append(c)
    expected = {
        tuple((_row(c), _key(c, c.expected_crc)) for c in block): i for i, block in blocks.items()
    }
    origins = {}
    for i, block in blocks.items():
        j = expected.get(tuple((_row(c), _key(c, c.found_crc)) for c in block), i)
        if j != i and any(c.differing for c in block):
            origins[i] = j
    texts = {}
    for i, j in origins.items():
        if origins.get(j) == i:
            text = f"blocks {min(i, j)} and {max(i, j)} are exchanged"
        else:
            text = f"block {i} is block {j} of the source"
        texts |= {c.pair.tensor.hf: text for c in blocks[i]}
    return texts


def _exchanged_tensors(compared: Sequence[Compared]) -> dict[str, str]:
    """Return findings, by HF name, of tensors that are another tensor of the source."""
    expected: dict[tuple[str, tuple[int, ...], int], list[Compared]] = defaultdict(list)
    for c in compared:
        expected[_key(c, c.expected_crc)].append(c)
    origins = {}
    for c in compared:
        if c.differing and (alike := expected.get(_key(c, c.found_crc))):
            same_row = [other for other in alike if _row(other) == _row(c)]
            origins[c.pair.tensor.hf] = (same_row or alike)[0].pair.tensor.hf
    texts = {}
    for name, other in origins.items():
        if origins.get(other) == name:
            pair = (name, other) if other not in texts else (other, name)
            texts[name] = f"{pair[0]} and {pair[1]} are exchanged"
        else:
            texts[name] = f"{name} is {other} of the source"
    return texts


def _from_figures(c: Compared) -> str | None:
    if c.zero_found:
        return "all values are zero"
    if c.differing == 1:
        return _one_value(c)
    transposed = c.pair.op is Op.TRANSPOSE and c.pair.info.dtype == c.pair.source.dtype
    return _untransposed(c.pair) if transposed and c.found_crc == c.source_crc else None


def _one_value(c: Compared) -> str:
    found, expected = (int.from_bytes(v.tobytes(), "little") for v in (c.found, c.expected))
    changed = found ^ expected
    text = "one value differs"
    if changed.bit_count() == 1:
        bit, dtype = changed.bit_length() - 1, NUMPY[c.pair.info.dtype]
        part = "sign" if bit == 8 * dtype.itemsize - 1 else "exponent"
        part = "mantissa" if bit < ml_dtypes.finfo(dtype).nmant else part
        text = f"one bit of one value is flipped: bit {bit}, of the {part}"
    if abs(found - expected) == 1:
        text += "; that is one unit in the last place"
    return text


def _untransposed(pair: Pair) -> str:
    if pair.op is Op.TRANSPOSE:
        return "the transposition was skipped"
    return "it is transposed, and must not be"


# Tests that read both sides again.


@dataclass(frozen=True, slots=True)
class _Sides:
    """One tensor on both sides, read in flat pieces of equal sizes."""

    pair: Pair
    source: TensorSource
    converted: TensorSource

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the converted side."""
        return NUMPY[self.pair.info.dtype]

    def pieces(self, op: Op | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield pieces of the source, laid out by `op` in its own dtype, and of the converted
        side."""
        theirs = Panels(self.source, self.pair.source_name, op or self.pair.op)
        yield from in_step(theirs, Panels(self.converted, self.pair.name, Op.COPY))

    def rounded(self, op: Op | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the same pieces with the source in the converted dtype."""
        for values, found in self.pieces(op):
            yield _cast(values, self.dtype), found


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(dtype, copy=False)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def _by_reading(c: Compared, sides: _Sides, config: GPTJConfig) -> str | None:
    return _layout(sides) or _values(sides) or _places(sides, config)


def _layout(sides: _Sides) -> str | None:
    """Return a finding if the values are stored in the other order of the axes, whatever the
    shape."""
    if len(sides.pair.info.shape) != 2:
        return None
    other = Op.COPY if sides.pair.op is Op.TRANSPOSE else Op.TRANSPOSE
    same = all(np.array_equal(_bits(x), _bits(y)) for x, y in sides.rounded(other))
    return _untransposed(sides.pair) if same else None


def _values(sides: _Sides) -> str | None:
    """Return a finding if one rule makes every value from the source's."""
    dtype = sides.dtype
    rules: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        f"the source, rounded to {name} on the way": lambda v, to=to: _cast(v, to)
        for name, to in FLOATS.items()
        if name in ("float16", "bfloat16") and to != dtype
    }
    rules["the source, cut to bfloat16 instead of rounded"] = _cut
    factor: float | None = None
    only_zeros, may_scale = True, True
    limit = ml_dtypes.finfo(dtype)
    for values, found in sides.pieces():
        for text in list(rules):
            if not np.array_equal(_bits(_cast(rules[text](values), dtype)), _bits(found)):
                del rules[text]
        expected = _cast(values, dtype)
        if only_zeros:
            only_zeros = not found[_bits(expected) != _bits(found)].any()
        if may_scale:
            x, y = expected.astype(np.float64), found.astype(np.float64)
            with np.errstate(all="ignore"):
                largest = int(np.argmax(np.abs(x)))
                if factor is None and x[largest]:
                    factor = float(y[largest] / x[largest])
                slack = 4 * float(limit.eps) * np.abs(y) + float(limit.tiny)
                may_scale = bool((np.abs(y - (factor or 1) * x) <= slack).all())
    if rules:
        return next(iter(rules))
    if only_zeros:
        return "every value that differs is zero"
    if may_scale and factor and abs(factor - 1) > 8 * float(limit.eps):
        return f"every value is {factor:.6g} times the source's"
    return None


def _cut(values: np.ndarray) -> np.ndarray:
    """Return float32 values without their lower halves."""
    if values.dtype != np.float32:
        return values
    return (_bits(values) & np.uint32(0xFFFF0000)).view(np.float32)


def _places(sides: _Sides, config: GPTJConfig) -> str | None:
    """Return a finding if rows or columns are elsewhere, or if only some of them differ."""
    found, expected = _hashes(sides)
    axes = [("rows", 0), ("columns", 1)] if len(sides.pair.info.shape) == 2 else [("values", 0)]
    if sides.pair.transposed:
        found, expected = found[::-1], expected[::-1]
    for what, axis in axes:
        of_heads = sides.pair.tensor.heads_axis == axis
        if text := _moved(found[axis], expected[axis], what, config if of_heads else None):
            return text
    for what, axis in axes:
        differ = np.flatnonzero(found[axis] != expected[axis])
        if 0 < 2 * differ.size < found[axis].size:
            return f"only {_span(what, differ)} differ"
    return None


def _span(what: str, places: np.ndarray) -> str:
    if places.size == 1:
        return f"{what} {places[0]}"
    return f"{places.size} {what} from {places[0]} to {places[-1]}"


def _hashes(sides: _Sides) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the hash of each row and each column of the converted layout, found and expected.

    A hash is the sum of the values' bits, each times a random number, modulo 2^64.
    """
    shape = sides.pair.info.shape
    height, width = shape if len(shape) == 2 else (shape[0], 1)
    random = np.random.default_rng(0)
    factors = [random.integers(1, 2**63, n, np.uint64) * 2 + 1 for n in (width, height)]
    result = [[np.zeros(n, np.uint64) for n in (height, width)] for _ in range(2)]
    at = 0
    for expected, found in sides.rounded():
        for sums, values in zip(result, (found, expected), strict=True):
            _add_hashes(sums, factors, _bits(values).astype(np.uint64), at, width)
        at += found.size
    return result[0], result[1]


def _add_hashes(
    sums: Sequence[np.ndarray],
    factors: Sequence[np.ndarray],
    bits: np.ndarray,
    at: int,
    width: int,
) -> None:
    rows, columns = sums
    by_column, by_row = factors
    while bits.size:
        row, column = divmod(at, width)
        if column or bits.size < width:  # part of a row
            part, end = bits[: width - column], min(width, column + bits.size)
            rows[row : row + 1] += (part * by_column[column:end]).sum(dtype=np.uint64)
            columns[column:end] += part * by_row[row]
        else:
            count = bits.size // width
            part = bits[: count * width]
            block = part.reshape(count, width)
            rows[row : row + count] += block @ by_column
            columns += by_row[row : row + count] @ block
        bits, at = bits[part.size :], at + part.size


def _moved(
    found: np.ndarray, expected: np.ndarray, what: str, heads: GPTJConfig | None
) -> str | None:
    """Return how rows (or columns) with these hashes are elsewhere, if that explains everything."""
    for shift in range(1, min(_SHIFTS, found.size - 1) + 1):
        for n, here, there in ((shift, found[shift:], expected[:-shift]),
                               (-shift, found[:-shift], expected[shift:])):  # fmt: skip
            if (
                here.size > 1
                and np.array_equal(here, there)
                and not np.array_equal(found, expected)
            ):
                return f"{what} are shifted by {n}"
    origin = _origins(found, expected)
    if origin is None:
        return None
    moved = np.flatnonzero(origin != np.arange(origin.size))
    if heads and (text := _heads_moved(origin, moved, what, heads)):
        return text
    if moved.size == 2:
        return f"{what} {moved[0]} and {moved[1]} are exchanged"
    return f"{what} are permuted: {moved.size} of {origin.size} are elsewhere"


def _origins(found: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
    """Return where in `expected` each element of a permutation of it comes from; None if it is no
    permutation."""
    origin = np.arange(found.size)
    places: dict[int, list[int]] = defaultdict(list)
    differ = np.flatnonzero(found != expected)
    if not differ.size:
        return None
    for n in differ[::-1]:
        places[int(expected[n])].append(int(n))
    for n in differ:
        there = places.get(int(found[n]))
        if not there:
            return None
        origin[n] = there.pop()
    return origin


def _heads_moved(
    origin: np.ndarray, moved: np.ndarray, what: str, config: GPTJConfig
) -> str | None:
    """Return the same in terms of heads, where heads explain it."""
    size = config.head_dim
    by_head = origin.reshape(config.n_head, size)
    inner, heads = by_head % size, by_head // size
    in_order = np.arange(size)
    if (inner == in_order).all() and (heads == heads[:, :1]).all():
        order = heads[:, 0]
        differ = np.flatnonzero(order != np.arange(config.n_head))
        if differ.size == 2:
            return f"heads {differ[0]} and {differ[1]} are exchanged"
        return f"heads are permuted: {order.tolist()}"
    if not (heads == np.arange(config.n_head)[:, None]).all():
        return None
    changed = np.unique(moved // size)
    one = inner[changed[0]]
    shift = int((in_order[0] - one[0]) % size)
    rotated = np.array_equal(np.roll(in_order, shift), one)
    how = f"are rotated by {shift}" if rotated else "are permuted"
    if changed.size == 1:
        return f"{what} of head {changed[0]} {how}"
    if (inner[changed] == one).all():
        which = "every head" if changed.size == config.n_head else f"{changed.size} heads"
        return f"{what} of {which} {how}, in each alike{_rotary_order(one, config)}"
    return f"{what} are permuted within heads"


def _rotary_order(order: np.ndarray, config: GPTJConfig) -> str:
    """Return a finding if features are in the order of the other kind of rotary embedding."""
    n = config.rotary_dim
    pairs = np.arange(n)
    halves = np.concatenate([pairs[0::2], pairs[1::2]])
    rest = np.arange(n, config.head_dim)
    for kind in (halves, np.argsort(halves)):
        if np.array_equal(order, np.concatenate([kind, rest])):
            return ": between the orders of interleaved and of split rotary features"
    return ""


# Tests of level structure.


def of_file(size: int | None, stated: int) -> str:
    """Return what became of a file that differs from the manifest.

    Args:
        size: size in bytes; None if the file does not exist.
        stated: size that the manifest states.
    """
    if size is None:
        return "it is missing"
    if size < stated:
        return f"it ends at byte {size}, of {stated} that were written"
    if size > stated:
        return f"it continues beyond byte {stated}, where it ended when it was written"
    return "it was changed after it was written"


def of_vocabulary(found: Mapping[str, int], expected: int) -> str | None:
    """Return what became of the vocabulary, given the rows of the tensors that have one row per
    token."""
    counts = set(found.values())
    if len(counts) != 1 or counts == {expected}:
        return None
    (count,) = counts
    if count < expected:
        return f"the vocabulary was cut: rows from {count} up are missing"
    return f"the vocabulary was enlarged: rows from {expected} up are new"
