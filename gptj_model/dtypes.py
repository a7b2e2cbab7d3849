"""The floating-point types of checkpoints, under one canonical name each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

#: Canonical name → numpy type. Every file format maps its own codes to these names.
FLOATS: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

#: Types in checkpoints that are not weights: counters and old mask buffers.
OTHERS: dict[str, np.dtype] = {
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}

NUMPY: dict[str, np.dtype] = FLOATS | OTHERS

#: Magnitudes from which a value is rounded to infinity, by dtype: half a step beyond the largest.
_OVERFLOW = {
    "float16": 65520.0,
    "bfloat16": float.fromhex("0x1.FFp+127"),
    "float32": float.fromhex("0x1.FFFFFFp+127"),
}
#: Number of elements examined at once, so that they stay in the cache.
_PIECE = 2**18


def largest(dtype: str) -> float:
    """Return the largest finite value of a float dtype."""
    return float(ml_dtypes.finfo(NUMPY[dtype]).max)


def widest(dtypes: Iterable[str]) -> str:
    """Return the widest of one or more float dtypes."""
    return max(dtypes, key=lambda name: FLOATS[name].itemsize)


def is_lossless(source: str, target: str) -> bool:
    """Return whether a float dtype can hold every value of another."""
    (x, y) = (ml_dtypes.finfo(NUMPY[name]) for name in (source, target))
    return bool(x.nmant <= y.nmant and x.maxexp <= y.maxexp and x.minexp >= y.minexp)


def count_nonfinite(values: np.ndarray) -> int:
    """Return the number of NaN and infinite elements of a contiguous float array."""
    infinite = _magnitudes(np.full(1, np.inf, values.dtype))[0]
    return sum(int(np.count_nonzero(m >= infinite)) for m in _pieces(values))


def count_overflows(values: np.ndarray, target: str) -> int:
    """Return the number of finite elements of a contiguous float array that `target` makes
    infinite."""
    if target not in _OVERFLOW or largest(values.dtype.name) < _OVERFLOW[target]:
        return 0
    limits = np.array([_OVERFLOW[target], np.inf]).astype(values.dtype)
    limit, infinite = _magnitudes(limits)
    return sum(int(np.count_nonzero((m >= limit) & (m < infinite))) for m in _pieces(values))


def saturate(values: np.ndarray, target: str) -> None:
    """Replace, in place, finite elements beyond the range of `target` by its largest value."""
    limit = largest(target)
    if largest(values.dtype.name) <= limit:
        return
    beyond = np.isfinite(values) & (np.abs(values) > limit)
    values[beyond] = np.copysign(limit, values[beyond].astype(np.float64)).astype(values.dtype)


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    flat = values.reshape(-1)
    return (_magnitudes(flat[at : at + _PIECE]) for at in range(0, flat.size, _PIECE))


def _magnitudes(values: np.ndarray) -> np.ndarray:
    """Return the bits without the sign as unsigned integers, which are ordered as the magnitudes
    are."""
    unsigned = np.dtype(f"u{values.itemsize}")
    return values.view(unsigned) & unsigned.type(2 ** (8 * values.itemsize - 1) - 1)
