"""GPTJConfig: what it takes, and what it refuses by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError


@st.composite
def configs(draw: st.DrawFn) -> GPTJConfig:
    heads = draw(st.integers(1, 8))
    head_dim = draw(st.integers(2, 64))
    return GPTJConfig(
        vocab_size=draw(st.integers(1, 60000)),
        n_positions=draw(st.integers(1, 4096)),
        n_embd=heads * head_dim,
        n_head=heads,
        n_layer=draw(st.integers(1, 40)),
        n_inner=draw(st.none() | st.integers(1, 1000)),
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        layer_norm_epsilon=draw(st.floats(1e-12, 0.1)),
        tie_word_embeddings=draw(st.booleans()),
        attn_pdrop=draw(st.floats(0, 0.9)),
    )


@given(configs())
def test_round_trip_through_config_json(config: GPTJConfig):
    assert GPTJConfig.from_hf(json.loads(json.dumps(config.to_hf(dtype="float32")))) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"n_head": 3}, "n_embd is 4096, expected a multiple of n_head (3)"),
        ({"rotary_dim": 63}, "rotary_dim is 63"),
        ({"rotary_dim": 258}, "rotary_dim is 258"),
        ({"rotary_dim": None}, "rotary_dim is None"),
        ({"n_layer": 10**12}, "n_layer is 1000000000000"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_embd": 4096.0}, "n_embd is 4096.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"resid_pdrop": 1.0}, "resid_pdrop is 1.0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict, named: str):
    values = GPTJConfig().to_hf(dtype="float32") | changes
    with pytest.raises(ConfigError) as refused:
        GPTJConfig.from_hf(values)
    assert named in refused.value.message


def test_every_problem_is_named_at_once():
    values = GPTJConfig().to_hf(dtype="float32") | {"n_layer": -1, "activation_function": "relu"}
    with pytest.raises(ConfigError, match=r"n_layer.*activation_function"):
        GPTJConfig.from_hf(values)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '"gptj"', "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape")]
)
def test_a_file_that_is_no_config_is_refused(text: str | bytes, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"config\.json"):
        GPTJConfig.from_file(path)


def test_a_missing_number_is_named():
    values = GPTJConfig().to_hf(dtype="float32")
    del values["rotary_dim"]
    with pytest.raises(ConfigError, match="rotary_dim missing"):
        GPTJConfig.from_hf(values)
