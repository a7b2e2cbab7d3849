"""params.yaml: what is read, and what is refused with its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from gptj_convert.reference_yaml import (
    config_from_model_section,
    continued_pretraining,
    model_section,
    read_yaml,
    yaml_text,
)
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from runner.params_file import load_params, validate
from tests.conftest import GOLDEN_RUNS, SMALL
from tests.unit.test_config import configs

CONFIG = GPTJConfig.preset("tiny", **SMALL)


def _values() -> dict[str, Any]:
    return continued_pretraining(CONFIG)


def _refused(settings: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        validate(_values(), settings, where="params.yaml")
    return refused.value.message


@pytest.mark.parametrize("case", ["adamw", "shared_embedding"])
def test_the_references_files_are_read(case: str):
    params = load_params(GOLDEN_RUNS / case / "params.yaml")
    from_hf = GPTJConfig.from_file(GOLDEN_RUNS / case / "hf/config.json")
    assert params.config.dims == from_hf.dims
    assert params.config.tie_word_embeddings == from_hf.tie_word_embeddings
    assert params.log_steps == 1


def test_defaults_are_the_references():
    params = validate(_values(), {}, where="params.yaml")
    assert params.optimizer.beta2 == 0.999
    assert params.optimizer.exclude_from_weight_decay == [
        "LayerNorm",
        "layer_norm",
        "bias",
        "Bias",
    ]
    minimal = {"hidden_size": 8, "num_heads": 2, "rotary_dim": 4, "max_position_embeddings": 16}
    config = config_from_model_section(minimal, vocab_size=9, where="x")
    assert config.layer_norm_epsilon == 1e-8
    assert config.n_layer == 1
    assert config.tie_word_embeddings is True


@given(configs())
def test_the_model_section_round_trips(config: GPTJConfig):
    back = config_from_model_section(model_section(config), vocab_size=config.vocab_size, where="x")
    for name in ("dims", "n_layer", "n_head", "rotary_dim", "layer_norm_epsilon", "attn_pdrop",
                 "tie_word_embeddings", "n_positions"):  # fmt: skip
        assert getattr(back, name) == getattr(config, name)


def test_what_was_effective_is_read_back(tmp_path: Path):
    params = validate(_values(), {"optimizer.learning_rate": 0.5}, where="x")
    (tmp_path / "params.yaml").write_text(params.to_yaml())
    assert load_params(tmp_path / "params.yaml") == params


def test_a_small_number_without_a_dot_is_a_number(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-4\nb: no\n")
    assert read_yaml(path) == {"a": 0.0001, "b": "no"}


def test_a_single_folder_and_a_list_are_the_same():
    for value in ("data", ["data"]):
        params = validate(_values(), {"train_input.data_dir": value}, where="x")
        assert params.train_input.data_dir == ["data"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimiser", {}, ["optimiser is not a known key", "did you mean 'optimizer'?"]),
        ("optimizer.learningrate", 1, ["did you mean 'learning_rate'?"]),
        ("runconfig.max_step", 3, ["runconfig.max_step is not a known key", "'max_steps'"]),
        ("train_input.batch_size", 0, ["train_input.batch_size is '0'", "greater than 0"]),
        ("train_input.batch_size", "four", ["train_input.batch_size is 'four'"]),
        ("optimizer.optimizer_type", "lion", ["optimizer.optimizer_type is 'lion'", "'adamw'"]),
        ("optimizer.learning_rate", float("nan"), ["optimizer.learning_rate[0]", "finite"]),
        ("optimizer.learning_rate", -1, ["optimizer.learning_rate[0].learning_rate is '-1'"]),
        (
            "optimizer.learning_rate",
            [{"scheduler": "Cosine", "initial_learning_rate": 1, "decay_stepz": 4}],
            [
                "optimizer.learning_rate[0].decay_steps is missing",
                "decay_stepz is not a known key, did you mean 'decay_steps'?",
            ],
        ),
        ("optimizer.learning_rate", [{"scheduler": "Step"}], ["'Linear'"]),
        (
            "optimizer.learning_rate",
            [{"scheduler": "Constant", "learning_rate": 1}] * 2,
            ["optimizer.learning_rate[0]: steps missing"],
        ),
        ("optimizer.max_gradient_value", 1.0, ["both set"]),
        ("model.backbone_only", True, ["model.backbone_only is 'True'"]),
        ("optimizer.loss_scaling_factor", "dynamik", ["optimizer.loss_scaling_factor"]),
        ("optimizer.loss_scaling_factor", 0, ["optimizer.loss_scaling_factor is '0'"]),
        ("optimizer.min_loss_scale", 1e-9, ["optimizer.min_loss_scale is '1e-09'"]),
        ("model.initializer", [{"name": "variance_scaling"}], ["model.initializer", "scale_type"]),
        ("model.initializer", [{"name": "normal", "stdev": 1}], ["did you mean 'stddev'?"]),
        ("train_input.max_sequence_length", 4096, ["at most model.max_position_embeddings"]),
    ],
)
def test_what_is_wrong_is_named_with_its_path(key: str, value: Any, words: list[str]):
    message = _refused({key: value})
    for word in words:
        assert word in message


def test_every_problem_is_named_at_once():
    message = _refused({"runconfig.max_stepz": 1, "train_input.batch_size": -1})
    assert "runconfig.max_stepz" in message
    assert "train_input.batch_size" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nonlinearity", "gelu_new"),
        ("use_ffn_bias", False),
        ("use_bias_in_output", False),
        ("use_untied_layer_norm", True),
        ("use_projection_bias_in_attention", True),
    ],
)
def test_a_model_that_is_no_gptj_is_refused(key: str, value: Any):
    params = validate(_values(), {f"model.{key}": value}, where="x")
    with pytest.raises(ConfigError, match=rf"model\.{key}"):
        _ = params.config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("a:\n\tb: 1\n", "line 2"),
        ("- 1\n", "expected a mapping"),
        ("a: !!python/object/apply:os.system ['touch ran']\n", "could not determine a constructor"),
        ("a: [1\n", "line"),
        ("\x00", "YAML"),
    ],
)
def test_yaml_that_is_none_is_refused(text: str, words: str, tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_yaml(path)
    assert str(path) in refused.value.message
    assert words in refused.value.message


def test_a_bomb_of_aliases_is_refused(tmp_path: Path):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [" + f" *a{n - 1} ," * 9 + "]" for n in range(1, 12)]
    path = tmp_path / "params.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="aliases"):
        read_yaml(path)


def test_a_huge_file_is_refused(tmp_path: Path):
    path = tmp_path / "params.yaml"
    with path.open("wb") as f:
        f.truncate(100 * 2**20)
    with pytest.raises(ConfigError, match="larger than"):
        read_yaml(path)


def test_yaml_text_is_read_back(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(yaml_text(_values()))
    assert read_yaml(path) == _values()
