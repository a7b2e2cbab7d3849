"""Causal attention by a fused kernel on JAX, whose scores never exist in memory.

The kernel multiplies in the compute dtype, so its results are those of `Attention.mix` but for
rounding. It has no mask beside the causal one: right padding is not looked at by the tokens before
it, and the loss leaves it out.

Shape suffixes: B batch, T time, D hidden, H heads, K features of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import keras

from gptj_model.config import GPTJConfig
from gptj_model.network.array_type import Tensor as Array
from gptj_model.network.layers import Attend, Attention
from gptj_model.network.model import make_context

#: Libraries that have such a kernel; XLA's runs everywhere, and keeps the scores.
Implementation = Literal["cudnn", "xla"]


def flash_attention(config: GPTJConfig, implementation: Implementation = "cudnn") -> Attend:
    """Return attention by one kernel, which raises where that does not run: Keras' own switch falls
    back silently."""

    def attend(q_BTHK: Array, k_BTHK: Array, v_BTHK: Array) -> Array:
        dtype = v_BTHK.dtype
        return jax.nn.dot_product_attention(
            q_BTHK.astype(dtype),
            k_BTHK.astype(dtype),
            v_BTHK,
            scale=config.head_dim**-0.5,
            is_causal=True,
            implementation=implementation,
        )

    return attend


def differences(
    config: GPTJConfig, attend: Attend, *, dtype: str, batch: int, length: int
) -> dict[str, float]:
    """Compare the attention of one block with the plain one, on random weights and hidden states
    whose scores have a deviation of about 1.

    Args:
        config: configuration of the model.
        attend: attention to compare.
        dtype: Keras dtype policy, such as "mixed_bfloat16".
        batch: number of sequences.
        length: tokens per sequence.

    Returns:
        Norm of the difference over the norm of the plain result, of the output and of the gradients
        of hidden states and weights.
    """
    plain, fused = (_results(config, a, dtype, batch, length) for a in (None, attend))
    return {name: _relative(fused[name], plain[name]) for name in plain}


def _results(
    config: GPTJConfig, attend: Attend | None, dtype: str, batch: int, length: int
) -> Mapping[str, Array]:
    with keras.StatelessScope(initialize_variables=False):
        seeds = keras.random.SeedGenerator(0)
        layer = Attention(config, seeds, dtype=dtype, name="attn")
        layer.build((None, None, config.n_embd))
    layer.attend = attend
    names = [v.path for v in layer.weights]

    def output(x_BTD: Array, weights: list[Array]) -> Array:
        pairs = list(zip(layer.weights, weights, strict=True))
        with keras.StatelessScope(pairs, initialize_variables=False):
            return layer(x_BTD, make_context(config, length, length))[0]

    @jax.jit
    def run(key: Array) -> dict[str, Array]:
        of_x, of_y, *of_weights = jax.random.split(key, 2 + len(names))
        compute = layer.compute_dtype
        x_BTD = jax.random.normal(of_x, (batch, length, config.n_embd), compute)
        weights = [
            jax.random.normal(k, v.shape) * v.shape[0] ** -0.5
            for k, v in zip(of_weights, layer.weights, strict=True)
        ]
        y_BTD, pull = jax.vjp(output, x_BTD, weights)
        d_x_BTD, gradients = pull(jax.random.normal(of_y, y_BTD.shape, y_BTD.dtype))
        return {"output": y_BTD, "hidden states": d_x_BTD} | dict(
            zip(names, gradients, strict=True)
        )

    return run(jax.random.key(0))


def _relative(found: Array, expected: Array) -> float:
    wide = expected.astype(jnp.float32)
    difference: Any = jnp.linalg.norm((found.astype(jnp.float32) - wide).ravel())
    return float(difference / jnp.linalg.norm(wide.ravel()))
