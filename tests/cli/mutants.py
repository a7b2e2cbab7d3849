"""Models that compute something else: the project's own with one line of it changed each.

docs/verification.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import pytest
from keras import ops

from gptj_model.network import layers, model, rotary
from gptj_model.streaming import forward


@dataclass(frozen=True)
class Mutant:
    """A model with a fault in one place."""

    what: str
    change: Callable[[pytest.MonkeyPatch], None]
    block: int | None = 0
    operation: str | None = None

    def __str__(self) -> str:
        return self.what


def _halves(x_BTHK, sin_BTR2, cos_BTR2):
    half = sin_BTR2.shape[-1]
    sin, cos = sin_BTR2[:, :, None], cos_BTR2[:, :, None]
    first, second, rest = x_BTHK[..., :half], x_BTHK[..., half : 2 * half], x_BTHK[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return ops.concatenate(turned, axis=-1)


def _rotates(rotate: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(layers, "rotate", rotate)


def _angles(change: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(model, "sin_cos_tables", change)

    return apply


def _half_precision(n_positions: int, rotary_dim: int):
    exponents = np.arange(0, rotary_dim, 2) / rotary_dim
    angles = np.arange(n_positions)[:, None] / rotary.BASE**exponents
    angles = angles.astype(np.float16).astype(np.float64)
    return np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)


def _other_base(n_positions: int, rotary_dim: int):
    angles = np.arange(n_positions)[:, None] / 9999.0 ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)


def _exact_gelu(patch: pytest.MonkeyPatch) -> None:
    exact = ops.gelu
    patch.setattr(layers.ops, "gelu", lambda x, approximate: exact(x, approximate=False))


def _in_softmax(change: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        sound = ops.softmax
        patch.setattr(layers.ops, "softmax", lambda x, axis: sound(change(x), axis=axis))

    return apply


def _block_call(call: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(layers.Block, "call", call)


def _sequential(self, x_BTD, context, cache=None, training=False):
    observe = layers.observe
    h_BTD = observe("ln_1", self.ln_1(x_BTD))
    attended_BTD, cache = self.attn(h_BTD, context, cache, training=training)
    x_BTD = x_BTD + attended_BTD
    return observe("residual", x_BTD + self.mlp(self.ln_1(x_BTD))), cache


def _no_residual(self, x_BTD, context, cache=None, training=False):
    h_BTD = layers.observe("ln_1", self.ln_1(x_BTD))
    attended_BTD, cache = self.attn(h_BTD, context, cache, training=training)
    return layers.observe("residual", attended_BTD + self.mlp(h_BTD)), cache


def _norm(change: Callable[[keras.layers.LayerNormalization], None], name: str):
    def apply(patch: pytest.MonkeyPatch) -> None:
        sound = layers.layer_norm

        def made(config, which, dtype):
            layer = sound(config, which, dtype)
            if which == name:
                change(layer)
            return layer

        for module in (layers, forward):
            patch.setattr(module, "layer_norm", made)

    return apply


def _passes_through(layer: keras.layers.LayerNormalization) -> None:
    layer.call = lambda x: x


def _other_epsilon(layer: keras.layers.LayerNormalization) -> None:
    layer.epsilon = 1e-3


def _context(change: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    def apply(patch: pytest.MonkeyPatch) -> None:
        sound = model.make_context
        patch.setattr(forward, "make_context", lambda *a, **k: change(sound(*a, **k)))

    return apply


def _sees_next(context: layers.Context) -> layers.Context:
    bias = ops.convert_to_numpy(context.bias_B1TS)
    wider = np.maximum(bias, np.roll(bias, 1, axis=-2) * 0 + np.where(
        np.eye(bias.shape[-2], bias.shape[-1], 1) > 0, 0.0, -np.inf))  # fmt: skip
    return context._replace(bias_B1TS=ops.convert_to_tensor(wider.astype(np.float32)))


def _not_itself(context: layers.Context) -> layers.Context:
    bias = ops.convert_to_numpy(context.bias_B1TS)
    rows, columns = bias.shape[-2:]
    own = np.eye(rows, columns, columns - rows) * np.arange(1, rows + 1)[:, None] > 1
    return context._replace(
        bias_B1TS=ops.convert_to_tensor(np.where(own, model.MASKED, bias).astype(np.float32))
    )


def _without_padding_mask(patch: pytest.MonkeyPatch) -> None:
    sound = model.make_context

    def context(config, T, S, positions_BT=None, attention_mask_BS=None, start=0):
        return sound(config, T, S, positions_BT, None, start)

    patch.setattr(forward, "make_context", context)


def _cache_one_late(patch: pytest.MonkeyPatch) -> None:
    sound = model.make_context

    def context(config, T, S, positions_BT=None, attention_mask_BS=None, start=0):
        late = start + 1 if start else start
        return sound(config, T, S, positions_BT, attention_mask_BS, late)

    patch.setattr(forward, "make_context", context)


MUTANTS = [
    Mutant("rotary features in split halves", _rotates(_halves), operation="rotary_q"),
    Mutant(
        "rotated the other way",
        _rotates(lambda x, sin, cos: rotary.rotate(x, -sin, cos)),
        operation="rotary_q",
    ),
    Mutant("no rotation", _rotates(lambda x, sin, cos: x), operation="rotary_q"),
    Mutant("angles in half precision", _angles(_half_precision), operation="rotary_q"),
    Mutant("a different base of the angles", _angles(_other_base), operation="rotary_q"),
    Mutant("the exact GELU", _exact_gelu, operation="gelu"),
    Mutant("scores not scaled", _in_softmax(lambda x: x * 12**0.5), operation="softmax"),
    Mutant("scores scaled by 1 %", _in_softmax(lambda x: x * 1.01), operation="softmax"),
    Mutant(
        "probabilities in half precision",
        _in_softmax(lambda x: ops.cast(ops.cast(x, "float16"), "float32")),
        operation="softmax",
    ),
    Mutant("a sequential residual", _block_call(_sequential), operation="fc_in"),
    Mutant("no residual", _block_call(_no_residual), operation="residual"),
    Mutant("a different epsilon", _norm(_other_epsilon, "ln_1"), operation="ln_1"),
    Mutant("no final norm", _norm(_passes_through, "ln_f"), None, "ln_f"),
    Mutant("a token sees the next one", _context(_sees_next), operation="softmax"),
    Mutant("a token does not see itself", _context(_not_itself), operation="softmax"),
    Mutant("padding is seen", _without_padding_mask, operation="padding"),
    Mutant("the cache is written one position late", _cache_one_late, operation="cache"),
]
