"""Float32 values rounded to bfloat16 stochastically on JAX's devices; see `stochastic_rounding`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def rounded(values: Any, dtype: Any, key: Any) -> Any:
    """Return finite float32 values in a dtype: bfloat16 is rounded at random, float32 kept.

    Args:
        values: array of float32.
        dtype: jnp.bfloat16 or jnp.float32.
        key: seed of the random bits, uint32 (2,).
    """
    if dtype == jnp.float32:
        return values
    words = jax.lax.bitcast_convert_type(values, jnp.uint32)
    # A value is rounded away from zero where adding the bits to its lower half carries.
    upper = (words + _random_bits(values.shape, key)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def _random_bits(shape: tuple[int, ...], key: Any) -> Any:
    """Return uniform numbers of 16 bits as uint32, a hash of the key and of each element's index.

    XLA computes them where they are used; those of JAX's generators are an array of their own, on a
    GPU of four bytes per element. The mixing is that of MurmurHash3 (A. Appleby, public domain),
    once for each half of the key.
    """
    bits = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        bits = bits * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for half in (key[0], key[1]):
        bits = bits ^ half
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> 16)
    return bits >> 16
