"""Rotary position embedding, on interleaved pairs of features.

Shape suffixes: B batch, T time, H heads, K features of a head, R rotated features.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false
# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false

from __future__ import annotations

from functools import lru_cache

import numpy as np
from keras import ops

from gptj_model.network.array_type import Tensor

#: Base of the geometric series of wavelengths.
BASE = 10000.0


@lru_cache(maxsize=8)
def sin_cos_tables(n_positions: int, rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines and cosines of every angle, each float32 of shape (n_positions, rotary_dim / 2).

    angle(p, i) = p / BASE^(2i / rotary_dim). Frequencies and angles are rounded to float32,
    as in the PyTorch model: at position 2047 that rounding moves an angle by up to 6e-5, so
    computing it "better" would differ from the original. Half precision would ruin it: at
    positions above 1024 float16 resolves 1 radian.
    """
    exponents = (np.arange(0, rotary_dim, 2) / rotary_dim).astype(np.float32)
    powers = np.power(BASE, exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1.0) / powers
    angles = np.arange(n_positions, dtype=np.float32)[:, None] * frequencies
    wide = angles.astype(np.float64)
    return np.sin(wide).astype(np.float32), np.cos(wide).astype(np.float32)


def rotate(x_BTHK: Tensor, sin_BTR2: Tensor, cos_BTR2: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the first R features of each head; the others pass unchanged.

    Args:
        x_BTHK: queries or keys.
        sin_BTR2, cos_BTR2: rows of `sin_cos_tables` at the position of each token, R/2 wide.
    """
    half = sin_BTR2.shape[-1]
    rotated, passed = x_BTHK[..., : 2 * half], x_BTHK[..., 2 * half :]
    pairs = ops.reshape(rotated, (*ops.shape(rotated)[:-1], half, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    sin, cos = sin_BTR2[:, :, None, :], cos_BTR2[:, :, None, :]
    turned = ops.stack((even * cos - odd * sin, odd * cos + even * sin), axis=-1)
    return ops.concatenate((ops.reshape(turned, ops.shape(rotated)), passed), axis=-1)
