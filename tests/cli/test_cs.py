"""The CS client's checkpoints: written as it writes them, and read from what it has written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ruamel.yaml import YAML

from gptj_convert.settings.trainer_yaml import trainer_from_params
from gptj_model.config import GPTJConfig
from gptj_model.tensors import Scheme, table
from tests.conftest import GOLDEN_RUNS, load_tensors, make_checkpoint

THEIRS = GOLDEN_RUNS / "cs"
HF = GOLDEN_RUNS / "adamw" / "hf"


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _attributes(item: Any) -> dict[str, Any]:
    return {key: _plain(value) for key, value in item.attrs.items()}


def _parsed(text: str) -> Any:
    """Return JSON whose strings may be JSON, with sorted keys."""
    found = json.loads(text)
    if isinstance(found, list):
        found[1] = json.loads(found[1])
        found[1][1]["children_spec"][0]["context"] = sorted(
            json.loads(found[1][1]["children_spec"][0]["context"])
        )
    return found


def test_what_is_written_is_what_the_client_writes(workdir: Path, gptj):
    assert gptj("convert", HF, "--to", "cs", "--quiet").code == 0
    with (
        h5py.File("converted-cs/model.mdl") as ours,
        h5py.File(THEIRS / "model.mdl") as theirs,
    ):
        assert set(ours) == set(theirs)
        found, expected = _attributes(ours), _attributes(theirs)
        assert _parsed(found.pop("__spec__")) == _parsed(expected.pop("__spec__"))
        assert found == expected
        for name in ours:
            assert _attributes(ours[name]) == _attributes(theirs[name])
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].shape == theirs[name].shape


@pytest.mark.parametrize("dtype", ["keep", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_round_trip(dtype: str, tied: bool, workdir: Path, small_pieces: None, gptj):
    hf = make_checkpoint(workdir / "hf", tie_word_embeddings=tied)
    assert gptj("convert", hf, "--to", "cs", "--dtype", dtype).code == 0
    done = gptj("verify", "converted-cs", "--level", "weights", "--json")
    assert done.code == 0, done.stdout
    assert gptj("convert", "converted-cs", "--to", "hf", "--out", "back").code == 0
    assert gptj("verify", "back", "--level", "weights").code == 0
    if dtype == "keep":
        before, after = (load_tensors(Path(p) / "model.safetensors") for p in ("hf", "back"))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_tied_head_is_there_for_the_client(workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf", tie_word_embeddings=True)
    assert gptj("convert", hf, "--to", "cs").code == 0
    with h5py.File("converted-cs/model.mdl") as file:
        head, embedding = (
            file[f"model.{name}"][:]
            for name in ("lm_head.weight", "embedding_layer.word_embeddings.weight")
        )
    assert np.array_equal(head, embedding)


def test_the_clients_own_checkpoint_is_read(workdir: Path, small_pieces: None, gptj):
    """The client's checkpoint has compressed chunks, and its config only in trainer.yaml."""
    done = gptj("verify", THEIRS, "--against", HF, "--json")
    assert done.code == 0, done.stdout
    assert done.json["levels"]["logits"]["ok"]


def _as_a_run(path: Path, step: int) -> None:
    """Write a checkpoint of a client's run: names have a prefix, some entries are no weights."""
    with h5py.File(THEIRS / "model.mdl") as theirs, h5py.File(path, "w") as file:
        import hdf5plugin

        file.attrs.update({"__SUCCESS__": True, "__version__": 0.5})
        for name, dataset in theirs.items():
            file.create_dataset(
                f"model.{name}", data=dataset[:] + step, chunks=True, **hdf5plugin.LZ4()
            )
        file["optimizer.state.0.exp_avg"] = np.zeros((512, 64), np.float32)
        file["optimizer.state.0.beta1_power"] = np.float32(0.1)
        file.create_dataset("global_step", data=np.int64(step))


def test_a_runs_newest_checkpoint_converts_back(workdir: Path, gptj):
    shutil.copyfile(THEIRS / "trainer.yaml", "trainer.yaml")
    Path("model_dir").mkdir()
    for step in (9, 20):
        _as_a_run(Path(f"model_dir/checkpoint_{step}.mdl"), step)
    done = gptj("convert", "model_dir", "--to", "hf", "--out", "home")
    assert done.code == 0, done.stderr
    home, begin = (load_tensors(Path(p) / "model.safetensors") for p in ("home", HF))
    assert all(np.array_equal(home[name], begin[name] + np.float32(20)) for name in begin)
    shown = gptj("inspect", "model_dir/checkpoint_9.mdl").stdout
    assert "training state (3)" in shown


def _damaged(change) -> Path:
    path = Path("damaged.mdl")
    shutil.copyfile(THEIRS / "model.mdl", path)
    shutil.copyfile(THEIRS / "trainer.yaml", "trainer.yaml")
    with h5py.File(path, "a") as file:
        change(file)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.attrs.update({"__SUCCESS__": False}), "is incomplete"),
        (lambda f: f.pop("model.lm_head.bias"), "'lm_head.bias' is missing"),
        (lambda f: f.create_dataset("model.other", data=1.0), "'other' is not a tensor"),
        (
            lambda f: f["model.ln_f.weight"].__setitem__(0, 7.0),
            "'ln_f.weight' differs from 'transformer_decoder.norm.weight'",
        ),
        (
            lambda f: f.update({"model.lm_head.bias2": h5py.SoftLink("/model.lm_head.bias")}),
            "is a link",
        ),
    ],
    ids=["unfinished", "missing", "unknown", "another copy", "a link"],
)
def test_a_damaged_checkpoint_is_refused(change, words: str, workdir: Path, gptj):
    done = gptj("convert", _damaged(change), "--to", "hf")
    assert done.code == 1
    assert words in done.stderr


def test_without_a_config_the_error_names_what_is_missing(workdir: Path, gptj):
    shutil.copyfile(THEIRS / "model.mdl", "model.mdl")
    done = gptj("convert", "model.mdl", "--to", "hf")
    assert done.code == 2
    assert "trainer.yaml" in done.stderr
    assert gptj("convert", "model.mdl", "--to", "hf", "--config", HF / "config.json").code == 0


def test_the_trainers_model_is_the_checkpoints(workdir: Path, gptj):
    assert gptj("convert", HF, "--to", "cs", "--quiet").code == 0
    ours, theirs = (
        YAML(typ="safe", pure=True).load(folder / "trainer.yaml")["trainer"]
        for folder in (Path("converted-cs"), THEIRS)
    )
    assert ours["init"]["model"] == theirs["init"]["model"]
    assert ours["fit"]["ckpt_path"] == "model.mdl"
    assert ours["fit"]["train_dataloader"]["data_processor"] == "GptHDF5MapDataProcessor"
    assert ours["init"]["backend"] == {"backend_type": "CSX"}
    (sequence,) = ours["init"]["schedulers"]
    kinds = [next(iter(member)) for member in sequence["SequentialLR"]["schedulers"]]
    assert kinds == ["LinearLR", "CosineDecayLR", "ConstantLR"]
    Path("converted-cs/trainer.yaml").write_text("changed: by hand\n")
    assert gptj("verify", "converted-cs", "--level", "weights").code == 0


def test_an_optimizer_that_the_client_lacks(workdir: Path):
    from gptj_model.errors import ConfigError

    config = GPTJConfig.preset("tiny")
    params = {
        "optimizer": {"optimizer_type": "momentum", "learning_rate": 0.1},
        "train_input": {"batch_size": 1},
    }
    with pytest.raises(ConfigError, match="momentum"):
        trainer_from_params(config, params, checkpoint="m.mdl", data=["d"])


def test_every_tensor_has_a_name_of_its_own():
    for tied in (False, True):
        tensors = table(GPTJConfig.preset("tiny", tie_word_embeddings=tied))
        names = [n for t in tensors for n in (t.name(Scheme.CS), *t.copies(Scheme.CS))]
        assert len(set(names)) == len(names)


def _trainer(**changes: dict[str, Any]) -> dict[str, Any]:
    params = YAML(typ="safe", pure=True).load(GOLDEN_RUNS / "adamw" / "params.yaml")
    for section, values in changes.items():
        params[section] |= values
    config = GPTJConfig.preset("tiny")
    return trainer_from_params(config, params, checkpoint=None, data=["d"])["trainer"]


def test_what_the_reference_keeps_elsewhere_is_translated():
    scale = {"loss_scaling_factor": "dynamic", "initial_loss_scale": 1024.0}
    scale |= {"steps_per_increase": 50, "grad_accum_steps": 3}
    trainer = _trainer(
        optimizer=scale,
        train_input={"shuffle": True, "shuffle_seed": 5},
        runconfig={"eval_steps": 7},
    )
    precision = trainer["init"]["precision"]
    assert {k: precision[k] for k in scale if k != "grad_accum_steps"}.items() <= scale.items()
    assert precision["max_gradient_norm"] == 1.0
    loader = trainer["fit"]["train_dataloader"]
    assert (loader["batch_size"], loader["shuffle"], loader["shuffle_seed"]) == (12, True, 5)
    assert trainer["init"]["loop"] == {"max_steps": 20, "eval_steps": 7}


def test_adam_is_adamw_without_decay():
    options = {"optimizer_type": "adam", "weight_decay_rate": 0.1, "use_bias_correction": False}
    found = _trainer(optimizer=options)["init"]["optimizer"]["adamw"]
    assert (found["weight_decay"], found["correct_bias"]) == (0.0, True)


def test_epsilon_in_16_bits_is_the_references():
    params = {"optimizer": {"epsilon": None}, "model": {"mixed_precision": True}}
    assert _trainer(**params)["init"]["optimizer"]["adamw"]["eps"] == 1e-5


def test_schedules_that_do_not_restart_are_refused():
    from gptj_model.errors import ConfigError

    with pytest.raises(ConfigError, match="disable_lr_steps_reset"):
        _trainer(optimizer={"disable_lr_steps_reset": True})
