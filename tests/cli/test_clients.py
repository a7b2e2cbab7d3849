"""What the two CS clients and this program hand to each other: YAML, folders of runs, decay."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from gptj_convert.settings.params_yaml import yaml_text
from gptj_model.config import GPTJConfig
from gptj_model.tensors import table
from runner.config.params import Section
from runner.config.params_file import load_params, validate
from runner.training.run.folder import accept_changes
from tests.conftest import GOLDEN_RUNS

ADAMW = GOLDEN_RUNS / "adamw"
CLIENTS = GOLDEN_RUNS / "cs"
CONFIG = ("--config", ADAMW / "hf" / "config.json")

#: Keys of `model` that the reference's program takes without a default, from its files.
WITHOUT_DEFAULT = {
    "boundary_casting", "filter_size", "hidden_size", "mixed_precision", "nonlinearity",
    "num_heads", "tf_summary", "use_ffn_bias", "use_ffn_bias_in_attention",
    "use_projection_bias_in_attention",
}  # fmt: skip


def _read(path: Path | str) -> dict[str, Any]:
    """Return the YAML as both clients read it."""
    return yaml.safe_load(Path(path).read_text())


def _assert_for_the_reference(path: Path | str) -> dict[str, Any]:
    values = _read(path)
    assert set(values) >= {"train_input", "eval_input", "model", "optimizer", "runconfig"}
    assert set(values["model"]) >= WITHOUT_DEFAULT
    assert values["model"]["boundary_casting"] is values["model"]["tf_summary"] is False
    assert {"learning_rate", "optimizer_type"} <= set(values["optimizer"])
    return values


@pytest.fixture
def reference_run(workdir: Path) -> Path:
    """A run's folder as the reference's program leaves it."""
    shutil.copytree(ADAMW / "ckpt", "model_dir")
    shutil.copytree(ADAMW / "records", "records")
    shutil.copyfile(ADAMW / "params.yaml", "params.yaml")
    Path("model_dir/checkpoint").write_text('model_checkpoint_path: "model.ckpt-20"\n')
    Path("model_dir/params.yaml").write_text(yaml_text(_resolved(_read("params.yaml"))))
    return Path("model_dir")


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """What the reference saves: defaults and initializers are written out."""
    model = values["model"]
    deviation = 512**-0.5
    scaled = {"name": "variance_scaling", "mode": "fan_in", "distribution": "truncated_normal"}
    defaults = {
        "dropout_seed": None, "weight_initialization_seed": None, "use_cache": False,
        "use_untied_layer_norm": False, "backbone_only": False, "attention_softmax_fp32": True,
        "embedding_dropout_rate": 0.0, "attention_dropout_rate": 0.0,
        "residual_dropout_rate": 0.0, "bits_per_x_dataset": "pile",
    }  # fmt: skip
    initializers = {
        "embedding_initializer": {"name": "truncated_normal", "mean": 0.0, "stddev": deviation},
        "initializer": scaled | {"scale": 1.0},
        "output_layer_initializer": scaled | {"scale": 4 / 9},
    }
    arguments = {
        "mode": "train", "model_dir": "model_dir", "params": "params.yaml", "cs_ip": None,
        "steps": None, "eval_steps": None, "validate_only": False, "compile_only": False,
        "device": None, "checkpoint_path": "tf_model.ckpt", "tf_random_seed": None,
        "throttle_secs": 0, "multiple_workers": False, "num_wgt_servers": 12,
        "disable_standard_logs": False,
    }  # fmt: skip
    return {
        "train_input": values["train_input"] | {"mixed_precision": False},
        "eval_input": values["eval_input"] | {"mixed_precision": False},
        "model": model | defaults | initializers,
        "optimizer": {"loss_scaling_factor": 1.0, "grad_accum_steps": 1} | values["optimizer"],
        "runconfig": values["runconfig"] | arguments,
    }


def test_params_yaml_has_what_the_reference_takes_without_a_default(workdir: Path, gptj):
    assert gptj("convert", ADAMW / "hf", "--to", "tf", "--quiet").code == 0
    values = _assert_for_the_reference("converted/params.yaml")
    assert values["optimizer"]["learning_rate"][0]["end_learning_rate"] == 4.3e-5


def test_params_yaml_of_a_run_and_of_its_state_has_it_too(reference_run: Path, gptj):
    values = _read("params.yaml")
    for key in ("boundary_casting", "tf_summary", "mixed_precision", "filter_size"):
        del values["model"][key]
    del values["eval_input"]
    values["optimizer"]["learning_rate"] = 5e-5
    Path("own.yaml").write_text(yaml_text(values))
    begin = ("--init-from", "model_dir/model.ckpt-20", "--params", "own.yaml", "--max-steps", 21)
    assert gptj("train", *begin, "--model-dir", "own", "--quiet").code == 0
    _assert_for_the_reference("own/params.yaml")
    shutil.copyfile("own.yaml", "model_dir/params.yaml")
    state = ("--to", "tf", "--optimizer-state", *CONFIG)
    assert gptj("convert", "model_dir", *state).code == 0
    values = _assert_for_the_reference("converted/params.yaml")
    assert values["optimizer"]["learning_rate"] == 5e-5


def test_the_references_folder_continues_with_the_file_that_it_was_begun_with(
    reference_run: Path, gptj
):
    onward = ("train", "--params", "params.yaml", "--max-steps", 21)
    assert gptj(*onward, "--validate-only").code == 0
    assert gptj(*onward, "--dry-run").code == 0
    done = gptj(*onward, "--quiet")
    assert done.code == 0, done.stderr
    assert Path("model_dir/model.ckpt-21.index").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.weight_decay_rate", 0.2),
        ("optimizer.beta1", 0.8),
        ("train_input.shuffle", True),
        ("train_input.skip_steps", 3),
        ("model.residual_dropout_rate", 0.1),
    ],
)
def test_what_makes_it_another_run_is_refused(reference_run: Path, key: str, value: Any, gptj):
    values = _read("params.yaml")
    section, name = key.split(".")
    values[section][name] = value
    Path("params.yaml").write_text(yaml_text(values))
    done = gptj("train", "--params", "params.yaml", "--max-steps", 21, "--validate-only")
    assert done.code == 2
    assert f"{key} was" in done.stderr


def _keys(section: type[Section], path: str = "") -> Any:
    for name, field in section.model_fields.items():
        yield f"{path}{name}", field.description or ""


#: A value for each key that is said to have no effect in training.
OTHER_VALUES = {
    "train_input.use_multiple_workers": True,
    "train_input.mixed_precision": True,
    "model.boundary_casting": True,
    "model.tf_summary": True,
    "model.precision_opt_level": 1,
    "model.use_cache": True,
    "model.weight_initialization_seed": 3,
    "model.bits_per_x_dataset": "pile",
    "model.initializer": [{"name": "normal", "stddev": 0.02}],
    "model.embedding_initializer": [{"name": "normal", "stddev": 0.02}],
    "model.output_layer_initializer": [{"name": "normal", "stddev": 0.02}],
    "optimizer.log_grads": True,
    "optimizer.log_hists": True,
    "optimizer.ws_summary": True,
    "optimizer.log_summaries": False,
    "optimizer.disable_standard_logs": True,
    "optimizer.momentum": 0.5,  # of another optimizer
    "optimizer.rmsprop_decay": 0.5,
    "optimizer.initial_loss_scale": 2.0,  # the scale is fixed
    "optimizer.overflow_tolerance": 0.5,
    "optimizer.max_gradient_value": 0,
    "train_input.shuffle_seed": 9,  # nothing is shuffled
    "train_input.shuffle_buffer": 99,
    "runconfig.num_wgt_servers": 3,
    "runconfig.disable_input_pipeline_ckpt": True,
    "runconfig.disable_standard_logs": True,
    "runconfig.params": "x",
    "csconfig": {"a": 1},
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_what_changes_nothing_is_accepted(key: str):
    before = load_params(ADAMW / "params.yaml")
    after = load_params(ADAMW / "params.yaml", {key: OTHER_VALUES[key]})
    assert after != before or key == "optimizer.max_gradient_value"
    accept_changes(after, before, {})


def test_every_key_without_effect_is_tried():
    params = load_params(ADAMW / "params.yaml")
    sections = {n: type(getattr(params, n)) for n in ("train_input", "model", "optimizer")}
    found = {
        key
        for name, section in (sections | {"runconfig": type(params.runconfig)}).items()
        for key, meaning in _keys(section, f"{name}.")
        if "No effect" in meaning and "No effect in" not in meaning
    }
    assert found <= set(OTHER_VALUES)


def test_where_a_launch_on_a_system_began_is_not_a_parameter():
    values = yaml.safe_load((ADAMW / "params.yaml").read_text())
    before = validate(
        json.loads(json.dumps(values)),
        {"train_input.skip_steps": 20, "runconfig.cs_ip": "10.0.0.1:9000"},
        where="saved",
    )
    accept_changes(validate(values, {}, where="given"), before, {})


def _planned(gptj: Any, *options: object) -> dict[str, Any]:
    done = gptj("train", "--params", "params.yaml", *options, "--dry-run", "--json")
    assert done.code == 0, done.stderr
    return done.json


@pytest.mark.parametrize("execution", ["resident", "streaming"])
def test_disk_is_planned_for_every_checkpoint_that_is_kept(
    execution: str, workdir: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    from gptj_convert.resources import machine

    shutil.copytree(ADAMW / "records", "records")
    shutil.copyfile(ADAMW / "params.yaml", "params.yaml")
    all_kept = ("--set", "runconfig.keep_checkpoint_max=0")
    begin = ("--init-from", ADAMW / "hf", "--execution", execution,
             "--set", "runconfig.save_checkpoints_steps=3")  # fmt: skip
    state = 12 * 214_976

    def disk(*more: object) -> int:
        return _planned(gptj, *begin, *more)["disk_bytes"]

    passing = execution == "streaming"
    scratch = disk() - 3 * state  # two are kept, and one is written
    # After steps 3, 6, …, 18 and 20; of a streamed run, that of a step that none is kept of.
    assert disk(*all_kept) - scratch == (7 + passing) * state
    assert disk(*all_kept, "--max-steps", 60) - scratch == (20 + passing) * state
    assert disk(*all_kept, "--max-steps", 2) - scratch == (1 + passing) * state
    monkeypatch.setattr(machine, "disk_free", lambda folder: 6 * state + scratch)
    refused = gptj("train", "--params", "params.yaml", *begin, *all_kept)
    assert refused.code == 1
    assert f"for {7 + passing} checkpoints" in refused.stderr


def test_the_plan_for_a_model_follows_the_converted_folder(workdir: Path, gptj):
    assert gptj("convert", ADAMW / "hf", "--to", "tf", "--quiet").code == 0

    def training() -> int:
        steps = gptj("doctor", "--plan", ADAMW / "hf", "--json").json["steps"]
        return next(s["disk"] for s in steps if s["command"].startswith("gptj train"))

    state = 12 * 214_976
    assert training() == 3 * state
    values = _read("converted/params.yaml")
    values["runconfig"] |= {"keep_checkpoint_max": 0}
    Path("converted/params.yaml").write_text(yaml_text(values))
    assert training() == 20 * state


def test_what_the_client_decays_keeps_decaying(workdir: Path, gptj):
    """The client's groups become patterns, and patterns become groups, or a note."""
    shutil.copyfile(CLIENTS / "checkpoint_20.mdl", "checkpoint_20.mdl")
    done = gptj("convert", "checkpoint_20.mdl", "--to", "tf", "--optimizer-state", *CONFIG)
    assert done.code == 0
    assert "weight decay 0.1 applies to matrices only" in done.stderr
    excluded = _read("converted/params.yaml")["optimizer"]["exclude_from_weight_decay"]
    for tensor in table(GPTJConfig.from_file(ADAMW / "hf" / "config.json")):
        decays = not any(re.search(pattern, tensor.tf) for pattern in excluded)
        assert decays == (len(tensor.shape) == 2), tensor.tf
    back = gptj("convert", "converted", "--to", "cs", "--optimizer-state")
    assert back.code == 0
    assert "instead" not in back.stderr


def test_what_the_client_cannot_decay_is_noted(reference_run: Path, gptj):
    done = gptj("convert", "model_dir", "--to", "cs", "--optimizer-state", *CONFIG)
    assert done.code == 0
    assert "weight decay 0.1 applies to matrices, ln_1.weight, ln_1.bias" in done.stderr
    assert "the result decays matrices only instead" in done.stderr
    done = gptj("convert", "model_dir", "--to", "hf", "--optimizer-state", *CONFIG)
    assert "the result decays all weights instead" in done.stderr
    assert "--param-groups decay" in done.stderr
    settings = _read("params.yaml")
    settings["optimizer"]["exclude_from_weight_decay"] = []
    Path("model_dir/params.yaml").write_text(yaml_text(settings))
    for target in ("cs", "hf"):
        state = ("--to", target, "--optimizer-state", "--out", f"all-{target}", *CONFIG)
        done = gptj("convert", "model_dir", *state)
        assert "applies to all weights" in done.stderr
        assert "instead" not in done.stderr
        home = ("convert", f"all-{target}", "--to", "tf", "--optimizer-state")
        assert gptj(*home, "--out", f"home-{target}").code == 0
        values = _read(f"home-{target}/params.yaml")
        assert values["optimizer"]["exclude_from_weight_decay"] == []


def test_a_run_is_warned_of_a_different_decay(workdir: Path, gptj):
    shutil.copyfile(CLIENTS / "checkpoint_20.mdl", "checkpoint_20.mdl")
    shutil.copyfile(ADAMW / "hf" / "config.json", "config.json")
    shutil.copyfile(ADAMW / "params.yaml", "params.yaml")
    records = ("--set", f"train_input.data_dir={ADAMW / 'records'}")
    begin = ("train", "--init-from", "checkpoint_20.mdl", "--params", "params.yaml", *records)
    done = gptj(*begin, "--max-steps", 20)
    assert done.code == 0, done.stderr
    assert "decayed matrices only, these parameters decay matrices, ln_1.weight" in done.stderr
    same = "optimizer.exclude_from_weight_decay=[LayerNorm,layer_norm,bias,Bias,ln_1]"
    done = gptj(*begin, "--max-steps", 20, "--model-dir", "other", "--set", same)
    assert done.code == 0
    assert "decayed" not in done.stderr


def _converters_yaml() -> str:
    """The client's own converter writes a section `model` without its name."""
    section = _read(CLIENTS / "trainer.yaml")["trainer"]["init"]["model"]
    left_out = ("name", "loss_scaling", "loss_weight")
    values = {key: value for key, value in section.items() if key not in left_out}
    return yaml.dump({"model": values | {"norm_first": True, "embedding_layer_norm": False}})


@pytest.mark.parametrize("kind", ["json", "params", "trainer", "trainers", "converter"])
def test_any_file_that_states_the_model_is_taken(kind: str, workdir: Path, gptj):
    """A file's content decides what it is, not its name."""
    texts = {
        "json": (ADAMW / "hf" / "config.json").read_text(),
        "params": (ADAMW / "params.yaml").read_text(),
        "trainer": (CLIENTS / "trainer.yaml").read_text(),
        "trainers": yaml.dump({"trainer": [_read(CLIENTS / "trainer.yaml")]}),
        "converter": _converters_yaml(),
    }
    name = Path("stated")
    name.write_text(texts[kind])
    shutil.copyfile(CLIENTS / "model.mdl", "model.mdl")
    for path in ADAMW.glob("tf_model.ckpt*"):
        shutil.copyfile(path, path.name)
    for n, source in enumerate(("model.mdl", "tf_model.ckpt")):
        done = gptj("convert", source, "--to", "hf", "--config", name, "--out", f"home-{n}")
        assert done.code == 0, done.stderr
        assert gptj("inspect", source, "--config", name).code == 0
        against = ("--against", ADAMW / "hf", "--config", name, "--level", "weights")
        assert gptj("verify", source, *against).code == 0
        against = ("--against", ADAMW / "hf", "--level", "weights")
        assert gptj("verify", f"home-{n}", *against).code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {}\n", ("has the keys train", "section `model` or `trainer`")),
        ("[1]\n", ("expected a mapping",)),
        ("trainer: {init: {}}\n", ("no section trainer.init.model",)),
        ("model: {vocab_size: 512}\n", ("model lacks hidden_size",)),
        ("model: {hidden_size: 64}\n", ("missing",)),
        ("{", ("is not valid",)),
    ],
)
def test_a_file_that_states_no_model_is_refused(text: str, words: Any, workdir: Path, gptj):
    Path("other.yaml").write_text(text)
    done = gptj("convert", ADAMW / "hf", "--to", "tf", "--config", "other.yaml")
    assert done.code == 2
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("backend", [None, "CSX", "CPU"])
def test_the_clients_backend_can_be_chosen(backend: str | None, workdir: Path, gptj):
    option = ("--cs-backend", backend) if backend else ()
    assert gptj("convert", ADAMW / "hf", "--to", "cs", *option).code == 0
    init = _read("converted-cs/trainer.yaml")["trainer"]["init"]
    assert init["backend"] == {"backend_type": backend or "CSX"}
    refused = gptj("convert", ADAMW / "hf", "--to", "tf", "--cs-backend", "CPU")
    assert refused.code == 2
    assert "--to cs" in refused.stderr


def test_yaml_of_the_client_is_written_again_as_numbers(workdir: Path, gptj):
    """Its own file, of which `gptj train` writes the effective one."""
    assert gptj("convert", ADAMW / "hf", "--to", "cs", "--quiet").code == 0
    text = Path("converted-cs/trainer.yaml").read_text()
    assert YAML(typ="safe", pure=True).load(text) == yaml.safe_load(text)
