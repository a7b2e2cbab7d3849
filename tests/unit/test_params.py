"""params.yaml: what is read, and what is refused with its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

import runner
from gptj_convert.settings.params_yaml import (
    config_from_model_section,
    model_section,
    read_yaml,
    yaml_text,
)
from gptj_convert.settings.pretraining import continued_pretraining
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from runner.config.params_file import load_params, validate
from runner.training.update.schedules import learning_rate
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


CONFIGS = sorted(Path(runner.__file__).parent.glob("configs/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_shipped_files_are_valid(path: Path, tmp_path: Path):
    params = load_params(path)
    assert params.config.vocab_size == 50400
    saved = tmp_path / "params.yaml"
    saved.write_text(params.to_yaml())
    assert load_params(saved) == params


def test_the_shipped_6b_files_are_the_references():
    params = load_params(CONFIGS[0].with_name("params_gptj.yaml"))
    assert params.config.dims == GPTJConfig.preset("6b").dims
    assert (params.train_input.batch_size, params.runconfig.max_steps) == (65, 2_700_000)
    rate = learning_rate(params.optimizer.learning_rate)
    assert rate(23_630) == pytest.approx(4.3e-5)
    assert rate(23_630 + 2_363_000) == pytest.approx(4.3e-6)
    assert params.dtype_policy == "mixed_float16"
    tuned = load_params(CONFIGS[0].with_name("params_gptj_6b_summarization.yaml"))
    assert tuned.config.attn_pdrop == 0.1
    assert learning_rate(tuned.optimizer.learning_rate)(250) == 0


#: Keys that the reference's own files and the files that it saves beside a run have.
AS_THE_REFERENCE_SAVES = """
train_input: {data_processor: GptTfRecordsProcessor, data_dir: [a, b], vocab_size: 512,
  max_sequence_length: 32, batch_size: '4', shuffle: yes, repeat: true, mixed_precision: true}
eval_input: {vocab_size: 512, shuffle: false, repeat: false, mixed_precision: true}
model:
  {hidden_size: 64, num_heads: 4, num_hidden_layers: 3, filter_size: 256, nonlinearity: gelu,
   rotary_dim: 8, max_position_embeddings: 64, layer_norm_epsilon: '1e-5', use_ffn_bias: true,
   use_projection_bias_in_attention: false, use_ffn_bias_in_attention: false, use_cache: false,
   use_position_embeddings: false, backbone_only: false, mixed_precision: true, tf_summary: false,
   boundary_casting: false, precision_opt_level: 0, attention_softmax_fp32: true,
   dropout_seed: null, weight_initialization_seed: null, bits_per_x_dataset: pile,
   embedding_initializer: {name: truncated_normal, mean: 0.0, stddev: 0.05},
   initializer: {name: variance_scaling, scale: 1.0, mode: fan_in, distribution: truncated_normal},
   output_layer_initializer:
     {name: variance_scaling, scale: 0.44, mode: fan_in, distribution: truncated_normal}}
optimizer:
  {optimizer_type: AdamW, learning_rate: '1e-4', max_gradient_norm: 0, max_gradient_value: null,
   loss_scaling_factor: dynamic, max_loss_scale: 4290774016.0, overflow_tolerance: 0.05,
   disable_lr_steps_reset: true, grad_accum_steps: 1, log_summaries: true, log_grads: true,
   log_hists: true, ws_summary: true, disable_standard_logs: false}
runconfig:
  {max_steps: 1e3, steps: null, eval_steps: null, save_checkpoints_steps: 10, mode: train,
   save_summary_steps: 5, keep_checkpoint_max: 0, enable_distributed: false, throttle_secs: 0,
   multiple_workers: false, cs_ip: null, checkpoint_path: null, num_wgt_servers: 12, device: null,
   tf_random_seed: null, model_dir: model_dir, params: params.yaml, validate_only: false,
   compile_only: false, disable_standard_logs: false, log_step_count_steps: 5}
"""


def test_what_the_reference_accepts_and_saves_is_read(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(AS_THE_REFERENCE_SAVES)
    params = load_params(path)
    assert params.eval_input is None
    assert params.train_input.shuffle is True
    assert params.train_input.batch_size == 4
    assert params.optimizer.optimizer_type == "adamw"
    assert params.optimizer.epsilon == 1e-5
    assert params.config.layer_norm_epsilon == 1e-5
    assert params.runconfig.max_steps == 1000
    assert params.eval_limit == 0
    assert learning_rate(params.optimizer.learning_rate)(7) == 1e-4


def test_epsilon_with_mixed_precision_is_the_one_that_is_set():
    assert validate(_values(), {"model.mixed_precision": True}, where="x").optimizer.epsilon == 1e-6
    values = _values()
    del values["optimizer"]["epsilon"]
    assert validate(values, {}, where="x").optimizer.epsilon == 1e-8


def test_a_vocab_file_is_counted(tmp_path: Path):
    (tmp_path / "vocab").write_text("a\nb\nc\n")
    values = _values()
    del values["train_input"]["vocab_size"]
    params = validate(values, {"train_input.vocab_file": str(tmp_path / "vocab")}, where="x")
    assert params.config.vocab_size == 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("  batch_size", "  batch_sise", ["line 7: train_input.batch_sise is not", "'batch_size'"]),
        ("  beta1: 0.9", "  beta1: .nan", ["line 4", "optimizer.beta1 is 'nan'"]),
        ("decay_steps: 5", "decay_steps: -5", ["optimizer.learning_rate[0].decay_steps is '-5'"]),
    ],
)
def test_a_problem_is_named_with_its_line(old: str, new: str, words: list[str], tmp_path: Path):
    rest = _values()
    text = (
        "optimizer:\n  optimizer_type: adamw\n  learning_rate: {scheduler: Cosine, "
        "initial_learning_rate: 1, decay_steps: 5}\n  beta1: 0.9\ntrain_input:\n"
        "  data_dir: d\n  batch_size: 4\n  max_sequence_length: 8\n  vocab_size: 99\n"
    )
    path = tmp_path / "params.yaml"
    path.write_text(text.replace(old, new) + yaml_text({"model": rest["model"]}))
    with pytest.raises(ConfigError) as refused:
        load_params(path)
    for word in words:
        assert word in refused.value.message


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
            ["optimizer.learning_rate[0]: steps is missing"],
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
