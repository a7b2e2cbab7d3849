"""Optimizers against the reference's rules in float64, several steps of random gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from gptj_model.config import GPTJConfig
from gptj_model.tensors import Scheme, table
from runner.config.params import OptimizerParams
from runner.training.update.optimizer import Optimizer
from runner.training.update.rule import BetaPowers
from tests.conftest import SMALL
from tests.unit.memory_source import MemorySource

TENSORS = [
    t for t in table(GPTJConfig.preset("tiny", **SMALL)) if t.block in (None, 0) and t.size < 5000
]
RATE = 0.03


def _expected(params: OptimizerParams, w, g, state: dict[str, Any], t: int, decay: float):
    """One update in float64, written from the reference's formulas."""
    kind, b1, b2 = params.optimizer_type, params.beta1, params.beta2
    if kind == "sgd":
        return w - RATE * g
    if kind == "momentum":
        state["a"] = params.momentum * state.get("a", 0) + g
        return w - RATE * state["a"]
    if kind == "rmsprop":
        state["ms"] = (
            params.rmsprop_decay * state.get("ms", 1.0) + (1 - params.rmsprop_decay) * g**2
        )
        state["mom"] = params.rmsprop_momentum * state.get("mom", 0) + RATE * g / np.sqrt(
            state["ms"] + 1e-10
        )
        return w - state["mom"]
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    correction = np.sqrt(1 - b2**t) / (1 - b1**t)
    if kind == "adam":
        return w - RATE * correction * state["m"] / (np.sqrt(state["v"]) + params.epsilon)
    update = state["m"] / (np.sqrt(state["v"]) + params.epsilon)
    if params.use_bias_correction:
        update = update * correction
    return w - RATE * (update + decay * w)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer_type": "sgd"},
        {"optimizer_type": "momentum", "momentum": 0.8},
        {"optimizer_type": "rmsprop"},
        {"optimizer_type": "rmsprop", "rmsprop_momentum": 0.5, "rmsprop_decay": 0.7},
        {"optimizer_type": "adam", "epsilon": 1e-3},
        {"optimizer_type": "adamw", "weight_decay_rate": 0.1, "epsilon": 1e-3},
        {"optimizer_type": "adamw", "weight_decay_rate": 0.1, "use_bias_correction": True},
        {"optimizer_type": "adamw", "weight_decay_rate": 0.1, "max_gradient_norm": 0.5},
        {"optimizer_type": "sgd", "max_gradient_value": 0.3},
        {
            "optimizer_type": "adamw",
            "weight_decay_rate": 0.2,
            "exclude_from_weight_decay": ["q_pr"],
        },
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_updates_are_the_references(options: dict):
    params = OptimizerParams(learning_rate=RATE, **options)
    random = np.random.default_rng(3)
    expected = {t: random.normal(size=t.shape_in(Scheme.TF)) for t in TENSORS}
    variables = {t: tf.Variable(w, dtype=tf.float32) for t, w in expected.items()}
    optimizer = Optimizer(params, variables)
    apply = tf.function(optimizer.apply)
    states: dict = {t: {} for t in TENSORS}
    for step in range(1, 5):
        gradients = {t: random.normal(size=expected[t].shape) for t in TENSORS}
        norm = apply(
            [tf.constant(g, tf.float32) for g in gradients.values()], *optimizer.arguments(RATE)
        )
        optimizer.advance()
        true_norm = np.sqrt(sum(np.square(g).sum() for g in gradients.values()))
        assert float(norm) == pytest.approx(true_norm, rel=1e-5)
        for t, g in gradients.items():
            if params.max_gradient_norm:
                g = g * min(1, params.max_gradient_norm / true_norm)
            if params.max_gradient_value:
                g = np.clip(g, -params.max_gradient_value, params.max_gradient_value)
            excluded = any(p in t.tf for p in params.exclude_from_weight_decay)
            decay = 0.0 if excluded else params.weight_decay_rate
            expected[t] = _expected(params, expected[t], g, states[t], step, decay)
    for t in TENSORS:
        np.testing.assert_allclose(variables[t].numpy(), expected[t], rtol=2e-5, atol=2e-6)


def test_ln_1_is_decayed_and_the_final_norm_is_not():
    params = OptimizerParams(optimizer_type="adamw", learning_rate=RATE, weight_decay_rate=0.5)
    variables = {t: tf.Variable(tf.ones(t.shape_in(Scheme.TF))) for t in TENSORS}
    optimizer = Optimizer(params, variables)
    zeros = [tf.zeros_like(v) for v in variables.values()]
    optimizer.apply(zeros, *optimizer.arguments(RATE))
    shrunk = {t.hf for t, v in variables.items() if float(tf.reduce_max(v)) < 1}
    assert "transformer.h.0.ln_1.weight" in shrunk
    assert "transformer.h.0.ln_1.bias" in shrunk
    assert "transformer.ln_f.weight" not in shrunk
    assert "lm_head.bias" not in shrunk


@pytest.mark.parametrize(
    ("options", "saved"),
    [
        ({"optimizer_type": "sgd"}, {}),
        ({"optimizer_type": "adamw"}, {}),
        (
            {"optimizer_type": "adamw", "use_bias_correction": True},
            {"beta1_power": 0.9**21, "beta2_power": 0.999**21},
        ),
        ({"optimizer_type": "adam"}, {"beta1_power": 0.9**21, "beta2_power": 0.999**21}),
    ],
)
def test_beta_powers_are_saved_as_the_reference_does(options: dict, saved: dict):
    params = OptimizerParams(learning_rate=RATE, **options)
    optimizer = Optimizer(params, {})
    for _ in range(20):
        optimizer.advance()
    found = optimizer.scalars()
    assert {k: float(v) for k, v in found.items()} == pytest.approx(saved)


def test_powers_are_the_checkpoints_where_it_has_them():
    powers = BetaPowers(OptimizerParams(learning_rate=RATE, optimizer_type="adam"))
    stored = {"beta1_power": np.float32(0.25), "w/Adam": np.zeros(3, np.float32)}
    powers.load(MemorySource({name: np.asarray(value) for name, value in stored.items()}), step=3)
    found = {name: float(value) for name, value in powers.scalars().items()}
    assert found == pytest.approx({"beta1_power": 0.25, "beta2_power": 0.999**4})
    assert powers.correction == pytest.approx(np.sqrt(1 - 0.999**4) / 0.75, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "theirs", "slots"),
    [
        ("sgd", lambda v1: v1.GradientDescentOptimizer(RATE), ()),
        ("momentum", lambda v1: v1.MomentumOptimizer(RATE, 0.9), ("momentum",)),
        ("adam", lambda v1: v1.AdamOptimizer(RATE, 0.9, 0.999, 1e-8), ("m", "v")),
        ("rmsprop", lambda v1: v1.RMSPropOptimizer(RATE, 0.9, 0.0), ("rms", "momentum")),
    ],
)
def test_updates_and_slots_are_tensorflows(kind: str, theirs: Any, slots: tuple[str, ...]):
    """TensorFlow's own optimizers round 1 - beta to float32; ours must agree to 1e-6."""
    random = np.random.default_rng(5)
    tensor = next(t for t in TENSORS if "fc_in.bias" in t.hf)
    begin = random.normal(size=tensor.shape_in(Scheme.TF)).astype(np.float32)
    ours, expected = tf.Variable(begin), tf.Variable(begin)
    optimizer = Optimizer(OptimizerParams(optimizer_type=kind, learning_rate=RATE), {tensor: ours})
    other = theirs(tf.compat.v1.train)
    apply = tf.function(optimizer.apply)
    for _ in range(5):
        gradient = tf.constant(random.normal(size=begin.shape), tf.float32)
        apply([gradient], *optimizer.arguments(RATE))
        optimizer.advance()
        other.apply_gradients([(gradient, expected)])
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-6, atol=1e-7)
    for found, name in zip(optimizer.slots.values(), slots, strict=True):
        slot = other.get_slot(expected, name).numpy()
        np.testing.assert_allclose(found.numpy(), slot, rtol=1e-6, atol=1e-9)


def test_adamw_is_torchs_where_epsilon_vanishes():
    """torch adds epsilon after the bias correction, the reference before; otherwise they agree."""
    import torch

    random = np.random.default_rng(11)
    tensor = next(t for t in TENSORS if "q_proj" in t.hf)
    begin = random.normal(size=tensor.shape_in(Scheme.TF)).astype(np.float32)
    params = OptimizerParams(
        optimizer_type="adamw",
        learning_rate=RATE,
        epsilon=1e-12,
        weight_decay_rate=0.1,
        use_bias_correction=True,
    )
    ours, theirs = tf.Variable(begin), torch.nn.Parameter(torch.from_numpy(begin.copy()))
    optimizer = Optimizer(params, {tensor: ours})
    other = torch.optim.AdamW([theirs], lr=RATE, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.1)
    apply = tf.function(optimizer.apply)
    for _ in range(5):
        gradient = random.normal(size=begin.shape).astype(np.float32)
        apply([tf.constant(gradient)], *optimizer.arguments(RATE))
        optimizer.advance()
        theirs.grad = torch.from_numpy(gradient)
        other.step()
    # The reference's 1 - beta2 is 1.3e-5 off in float32, and so its steps by 6e-6 of 0.03 each.
    np.testing.assert_allclose(ours.numpy(), theirs.detach().numpy(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw", "rmsprop"])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str):
    params = OptimizerParams(optimizer_type=kind, learning_rate=RATE, max_gradient_norm=1)
    variables = {t: tf.Variable(tf.ones(t.shape_in(Scheme.TF))) for t in TENSORS[:2]}
    optimizer = Optimizer(params, variables)
    state = [*variables.values(), *optimizer.slots.values()]
    before = [v.numpy() for v in state]
    bad = [tf.ones_like(v) * (np.inf if n else 1) for n, v in enumerate(variables.values())]
    norm = tf.function(optimizer.apply)(bad, *optimizer.arguments(RATE))
    assert not np.isfinite(float(norm))
    for variable, old in zip(state, before, strict=True):
        assert np.array_equal(variable.numpy(), old)
