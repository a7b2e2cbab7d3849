"""Multiplication of hidden states by a kernel.

Shape suffixes: I and O features in and out, P parts of the sum over I, R features per part.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalSubscript=false

from __future__ import annotations

import math
import os
from functools import cache

import keras
from keras import ops

from gptj_model.network.array_type import Tensor


def matmul(x: Tensor, kernel_IO: Tensor) -> Tensor:
    """Return x (…, I) times a kernel (I, O), shape (…, O).

    A single row is bound by reading the kernel. XLA reads it with one core if the product is fused
    with what follows, such as a bias; therefore each core takes a part of the sum over I. Without
    that, generation of one sequence on 2 cores with AVX-512 ran at 0.84 × the rate of transformers
    instead of 1.03 × (`benchmarks/generation.py`).

    Several sequences of one token are multiplied as rows of one matrix: TensorFlow would read the
    kernel once for each sequence (summaries of the 125m in groups of four took 2.3 × the time).
    """
    if x.shape[-2:-1] in ((1,), (None,)) and x.shape[:-2] != (1,):
        flat = ops.matmul(ops.reshape(x, (-1, x.shape[-1])), kernel_IO)
        return ops.reshape(flat, (*ops.shape(x)[:-1], kernel_IO.shape[1]))
    parts = math.gcd(_cores(), x.shape[-1])
    if parts == 1 or any(n != 1 for n in x.shape[:-1]):
        return ops.matmul(x, kernel_IO)
    x_P1R = ops.reshape(x, (parts, 1, -1))
    kernel_PRO = ops.reshape(kernel_IO, (parts, -1, kernel_IO.shape[1]))
    y_1O = ops.sum(ops.matmul(x_P1R, kernel_PRO), axis=0)
    return ops.reshape(y_1O, (*x.shape[:-1], -1))


@cache
def _cores() -> int:
    """Return the number of cores that multiply; 1 on JAX's accelerators, whose libraries divide a
    product themselves."""
    if keras.backend.backend() == "jax":
        import jax

        if jax.default_backend() != "cpu":
            return 1
    return os.cpu_count() or 1
