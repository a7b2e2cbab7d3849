"""The floating-point types a checkpoint may hold, under one name each."""

from __future__ import annotations

import ml_dtypes
import numpy as np

#: Canonical name → numpy type. Every file format maps its own codes to these names.
FLOATS: dict[str, np.dtype] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

#: Types that are not weights but occur in checkpoints (counters, old mask buffers).
OTHERS: dict[str, np.dtype] = {
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}

NUMPY: dict[str, np.dtype] = FLOATS | OTHERS

#: Largest finite float16; a larger float32 has no float16 value.
FLOAT16_MAX = 65504.0


def overflows(values: np.ndarray, target: str) -> bool:
    """Whether a finite element of `values` becomes infinite in `target` (a canonical name)."""
    if target == "float32" and values.dtype != np.float64:
        return False
    if target == values.dtype.name or target == "float64":
        return False
    with np.errstate(over="ignore"):
        cast = values.astype(NUMPY[target])
    return bool(np.any(np.isinf(cast) & np.isfinite(values)))
