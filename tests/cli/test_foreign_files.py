"""Checkpoints as people hold them: other names, other files, other folders than ours."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptj_convert.checkpoint.other_files import FILES, ROWS
from gptj_convert.checkpoint.tensor_problems import HINTS, WHOLES

State = dict[str, torch.Tensor]


@pytest.fixture
def state(hf: Path) -> State:
    """The weights of ./hf, whose config.json stays there and whose weights are to be written."""
    found = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").rename("original.safetensors")
    return found


def save(state: object, name: str = "pytorch_model.bin") -> Path:
    path = Path("hf", name)
    torch.save(state, path)
    return path


def converts(gptj, state: State, source: str = "hf", *options: str) -> str:
    """Convert a source that must become exactly these weights; return stderr."""
    done = gptj("convert", source, "--to", "hf", "--force", *options)
    assert done.code == 0, done.stderr
    found = load_file("converted-hf/model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], values) for name, values in state.items())
    return done.stderr


def refused(done, code: int, *words: str) -> str:
    """Check that a refusal contains these words, and return its hint."""
    assert done.code == code, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "a fault in gptj itself" not in done.stderr
    for word in words:
        assert word in done.stderr
    return done.stderr.partition("hint: ")[2].strip()


# Names.


@pytest.mark.parametrize(
    "prefix", ["module.", "base_model.model.", "_orig_mod.", "module._orig_mod.", "model.", "a.b."]
)
def test_one_common_prefix_is_removed_with_a_note(prefix: str, state: State, gptj):
    save({prefix + name: values for name, values in state.items()})
    said = converts(gptj, state)
    assert "removed from tensor names" in said


def test_wrappers_around_single_blocks_are_removed(state: State, gptj):
    def wrapped(name: str) -> str:
        return name.replace(".h.1.", ".h.1._fsdp_wrapped_module._checkpoint_wrapped_module.")

    save({wrapped(name): values for name, values in state.items()})
    assert "_fsdp_wrapped_module, _checkpoint_wrapped_module" in converts(gptj, state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_bare_body_beside_its_head_converts(prefix: str, state: State, gptj):
    save({prefix + n.removeprefix("transformer."): values for n, values in state.items()})
    assert "missing prefix 'transformer.' added to tensor names" in converts(gptj, state)


def test_every_command_reads_such_names(state: State, gptj):
    save({f"module.{name}": values for name, values in state.items()})
    prompt = ("--ids", "46,32", "--max-new-tokens", "4")
    wrapped = gptj("generate", "--model", "hf", *prompt)
    Path("hf/pytorch_model.bin").unlink()
    os.link("original.safetensors", "hf/model.safetensors")
    assert gptj("generate", "--model", "hf", *prompt).stdout == wrapped.stdout
    assert wrapped.code == 0
    assert "'module.'" in wrapped.stderr


@pytest.mark.parametrize("first", ["policy.", ""])
def test_two_models_in_one_file_are_one_line(first: str, state: State, gptj):
    both = {f"{p}{name}": values for p in ("value.", first) for name, values in state.items()}
    save(both)
    shown = repr(first) if first else "no prefix"
    done = gptj("convert", "hf", "--to", "tf")
    hint = refused(done, 1, f"holds 2 models, whose names of tensors begin with {shown}")
    assert hint.endswith("--drop 'value.*'")
    converts(gptj, state, "hf", "--drop", "value.*")


def test_a_head_is_never_invented(state: State, gptj):
    save({n.removeprefix("transformer."): v for n, v in state.items() if "lm_head" not in n})
    hint = refused(gptj("convert", "hf", "--to", "tf"), 1, "'lm_head.weight' is missing")
    assert "GPTJModel without a head" in hint


# What is beside the model, and what all of a file is.


def test_an_extra_tensor_is_named_and_can_be_dropped(state: State, gptj):
    extra = {"v_head.summary.weight": torch.ones(1, 4), "v_head.summary.bias": torch.ones(1)}
    save(state | extra)
    done = gptj("convert", "hf", "--to", "tf")
    hint = refused(done, 1, *(f"{name!r} is not a tensor of this model" for name in extra))
    assert "tie" not in done.stderr
    assert hint.startswith("convert with --drop 'v_head.*';")
    said = converts(
        gptj, state, "hf", "--drop", "v_head.summary.weight", "--drop", "*.summary.bias"
    )
    assert "dropped, as asked: v_head.summary.weight, v_head.summary.bias" in said
    manifest = json.loads(Path("converted-hf/manifest.json").read_text())
    assert manifest["source"]["dropped"] == list(extra)
    assert gptj("verify", "converted-hf", "--level", "weights").code == 0


def test_what_is_dropped_must_exist_and_be_no_weight(state: State, gptj):
    save(state | {"v_head.weight": torch.ones(1)})
    done = gptj("convert", "hf", "--to", "tf", "--drop", "v_had.weight")
    refused(done, 2, "--drop v_had.weight", "no tensor of this name")
    done = gptj("convert", "hf", "--to", "tf", "--drop", "lm_head.*", "--drop", "v_head.weight")
    refused(done, 2, "'lm_head.bias' is a weight of this model")
    assert not Path("converted").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "lm_head.weight"}, "holds a tied model"),
        (lambda s: {k: v for k, v in s.items() if "lm_head" not in k}, "without a head"),
        (lambda s: {**s, "extra": torch.ones(1)}, "--drop extra"),
        (lambda s: {k: v for k, v in s.items() if "ln_f" not in k and k != "lm_head.weight"}, None),
        (lambda s: {k: v for k, v in s.items() if "ln_f" not in k} | {"x": torch.ones(1)}, None),
    ],
)
def test_a_hint_is_given_only_where_it_holds(
    change: Callable[[State], State], words: str | None, state: State, gptj
):
    save(change(state))
    hint = refused(gptj("convert", "hf", "--to", "tf"), 1, "problem(s) with its tensors")
    assert words in hint if words else not hint


SUFFIXES = {
    ".weight.quant_state.bitsandbytes__nf4": "4 bits by bitsandbytes (NF4 or FP4)",
    ".weight.absmax": "4 bits by bitsandbytes",
    ".SCB": "8 bits by bitsandbytes",
    ".qweight .g_idx": "GPTQ",
    ".qweight .qzeros": "AWQ",
    ".weight_packed": "compressed-tensors",
    ".W_q": "HQQ",
    ".weight_scale_inv": "FP8",
    ".weight._data": "Quanto",
    ".lora_A.default.weight": "an unmerged adapter beside its weights",
}


@pytest.mark.parametrize("suffixes", SUFFIXES)
def test_a_problem_of_the_whole_file_takes_one_line(suffixes: str, state: State, gptj):
    matrices = [n.removesuffix(".weight") for n in state if "_proj" in n]
    added = {name + s: torch.ones(1) for name in matrices for s in suffixes.split()}
    save({n: v for n, v in state.items() if "_proj" not in n} | added)
    done = gptj("convert", "hf", "--to", "tf")
    hint = refused(done, 1, SUFFIXES[suffixes])
    assert len(done.stderr.splitlines()) == 2
    assert "save_pretrained" in hint
    inspected = gptj("inspect", "hf", "--json").json
    assert len(inspected["problems"]) == 1


def test_every_row_of_the_tables_is_walked():
    assert len(SUFFIXES) == len(WHOLES)
    assert len(HINTS) == 4  # three above; a head that config.json ties is in test_convert
    assert len(FOLDERS) == len(ROWS) + 3
    assert len(FILES) == 2


# Containers.


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "epoch=3.ckpt", "state", "weights.bin"])
def test_a_state_dict_is_known_by_its_content(name: str, state: State, gptj):
    converts(gptj, state, str(save(state, name)))


@pytest.mark.parametrize("name", ["renamed.bin", "renamed.pt", "renamed"])
def test_safetensors_are_known_by_their_content(name: str, state: State, gptj):
    shutil.copy("original.safetensors", f"hf/{name}")
    converts(gptj, state, f"hf/{name}")


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_state_dict_among_other_things_is_found(key: str, state: State, gptj):
    optimizer = {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 0.1}]}
    save({"epoch": 3, key: state, "optimizer": optimizer})
    assert f"reading the tensors under the key {key!r}; ignoring 'epoch', 'optimizer'" in converts(
        gptj, state
    )


def test_a_path_of_the_current_folder(state: State, gptj, monkeypatch: pytest.MonkeyPatch):
    save(state)
    monkeypatch.chdir("hf")
    assert gptj("convert", ".", "--to", "tf", "--out", "../converted").code == 0
    monkeypatch.chdir("../converted")
    for path in (".", "./", "../converted/."):
        assert gptj("verify", path, "--level", "weights").code == 0
        assert gptj("inspect", path).code == 0
    assert gptj("generate", "--model", ".", "--ids", "1", "--max-new-tokens", "1").code == 0


def test_tensorflow_finds_the_converted_checkpoint(converted: Path):
    import tensorflow as tf

    found = tf.train.latest_checkpoint(str(converted))
    assert found == str(converted / "tf_model.ckpt")
    assert tf.train.list_variables(found)


# Folders that hold no checkpoint of ours.


def _trainer(folder: Path) -> str:
    for step in (500, 1000, 20):
        shutil.copytree("hf", folder / f"checkpoint-{step}")
    return f"{folder}/checkpoint-1000"


def _cache(folder: Path) -> str:
    commit = "0" * 40
    shutil.copytree("hf", folder / f"models--me--mine/snapshots/{commit}")
    shutil.copytree("hf", folder / f"models--me--mine/snapshots/{'1' * 40}")
    (folder / "models--me--mine/refs").mkdir()
    (folder / "models--me--mine/refs/main").write_text("1" * 40)
    return f"{folder}/models--me--mine/snapshots/{'1' * 40}"


def _repository_of_cache(folder: Path) -> str:
    shutil.copytree("hf", folder / f"snapshots/{'0' * 40}")
    return f"{folder}/snapshots/{'0' * 40}"


def _files(*names: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        return ""

    return make


def _adapter(folder: Path) -> str:
    text = json.dumps({"base_model_name_or_path": "EleutherAI/gpt-j-6b"})
    (folder / "adapter_config.json").write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    return f"gptj convert EleutherAI/gpt-j-6b --adapter {folder} --to hf"


def _by_another_name(folder: Path) -> str:
    shutil.copy("hf/model.safetensors", folder / "model.fp16.safetensors")
    return f"{folder}/model.fp16.safetensors"


def _inner(folder: Path) -> str:
    shutil.copytree("hf", folder / "my model")
    return f"'{folder}/my model'"


FOLDERS: dict[str, tuple[Callable[[Path], str], str]] = {
    "shards": (_files("model-00001-of-00002.safetensors"), "without their index"),
    "trainer": (_trainer, "checkpoints of transformers' Trainer, the last checkpoint-1000"),
    "cache": (_cache, "the hub's cache"),
    "repository of the cache": (_repository_of_cache, "the hub's cache"),
    "adapter": (_adapter, "an adapter (adapter_config.json) and no model"),
    "deepspeed": (
        _files("global_step20/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        "a checkpoint of DeepSpeed",
    ),
    "distributed": (_files("__0_0.distcp", ".metadata"), "a distributed checkpoint of PyTorch"),
    "another name": (_by_another_name, "model.fp16.safetensors"),
    "tensorflow": (_files("tf_model.h5"), "weights of transformers' TensorFlow"),
    "flax": (_files("flax_model.msgpack", "config.json"), "weights of transformers' Flax"),
    "gguf": (_files("gpt-j-q4.gguf"), "weights of llama.cpp"),
    "inner": (_inner, "a checkpoint in its folder my model"),
    "config": (_files("config.json"), "config.json and no weights"),
    "empty": (_files(), "holds nothing"),
    "unknown": (_files("notes.txt"), "holds no checkpoint, expected one of"),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_folder_without_a_checkpoint_says_what_it_holds(kind: str, command: str, hf: Path, gptj):
    make, words = FOLDERS[kind]
    Path("held").mkdir()
    wanted = make(Path("held"))
    before = sorted(Path("held").rglob("*"))
    done = gptj(command, "held", *(("--to", "tf") if command == "convert" else ()))
    hint = refused(done, 1, words)
    assert wanted in hint
    assert bool(hint) == (kind != "unknown")
    assert sorted(Path("held").rglob("*")) == before


@pytest.mark.parametrize("kind", ["trainer", "cache", "another name", "inner"])
def test_the_path_of_such_a_hint_converts(kind: str, hf: Path, gptj):
    Path("held").mkdir()
    path = FOLDERS[kind][0](Path("held")).strip("'")
    config = () if Path(path).is_dir() else ("--config", "hf/config.json")
    assert gptj("convert", path, "--to", "tf", *config).code == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "is a JSON file"),
        ("flax_model.msgpack", "is a file of Flax"),
        ("a.txt", "is not a checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint(name: str, words: str, workdir: Path, gptj):
    Path(name).write_bytes(b"{}")
    refused(gptj("convert", name, "--to", "tf"), 1, words)
