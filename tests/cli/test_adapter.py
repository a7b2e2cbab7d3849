"""Adapters of the peft library, compared with it: merged within float32 rounding, and trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPTJForCausalLM

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.source import read_tensor
from tests.conftest import GOLDEN_RUNS, load_tensors, make_checkpoint

HF = GOLDEN_RUNS / "adamw" / "hf"
#: Largest rank here, so the most products that a merged element sums.
MOST_TERMS = 64
#: What the library says of heads and tied weights, which the tests are about.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting .save_embedding_layers", "ignore:.*tie_word_embeddings", "ignore:.*tied"
)
adamw = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)


def make_adapter(base: Path, folder: Path | str, *, dtype: Any = None, **fields: Any) -> Path:
    """An adapter of random values, saved by the library."""
    torch.manual_seed(5)
    model = get_peft_model(
        GPTJForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"]} | fields),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    if dtype:
        model = model.to(dtype)
    model.save_pretrained(str(folder))
    return Path(folder)


def merged_by_peft(base: Path, adapter: Path, dtype: Any = torch.float32) -> dict[str, np.ndarray]:
    """The weights after `merge_and_unload`, by name."""
    model = PeftModel.from_pretrained(
        GPTJForCausalLM.from_pretrained(base, dtype=dtype), str(adapter)
    )
    merged = model.merge_and_unload()
    return {name: values.float().numpy() for name, values in merged.state_dict().items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Check that merged weights are peft's; a tied head is stored once.

    MKL adds up in an order of its own on each kind of processor (AMD's differs from Intel's), so
    two sums of `MOST_TERMS` products may differ by the rounding of every step.
    """
    assert set(found) <= set(expected)
    for name, values in found.items():
        assert values.dtype == np.float32, name
        wanted = expected[name]
        limit = MOST_TERMS * 2.0**-24 * float(np.abs(wanted).max())
        assert float(np.abs(values - wanted).max()) <= limit, name


def converted(folder: Path | str) -> dict[str, np.ndarray]:
    return load_tensors(Path(folder) / "model.safetensors")


KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "rank 1": {"r": 1, "lora_alpha": 3},
    "rank 64": {"r": 64, "lora_alpha": 16, "target_modules": ["fc_in", "fc_out"]},
    "all": {"r": 3, "target_modules": "all-linear"},
    "pattern": {"r": 5, "target_modules": r".*\.h\.[02]\..*(k|out)_proj"},
    "stabilized": {"r": 12, "lora_alpha": 7, "use_rslora": True},
    "own ranks": {
        "r": 4,
        "rank_pattern": {"h.1.attn.q_proj": 9, "v_proj": 2},
        "alpha_pattern": {"v_proj": 1.5},
    },
    "some blocks": {"layers_to_transform": [1]},
    "one block, by name": {"layers_to_transform": 2, "layers_pattern": "h"},
    "but for some": {"target_modules": "all-linear", "exclude_modules": ["fc_in", "k_proj"]},
    "the head": {"target_modules": ["q_proj", "lm_head"], "r": 6},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "embedding and norms": {"modules_to_save": ["wte", "ln_f"], "target_modules": ["fc_out"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_weights_of_the_library(
    kind: str, workdir: Path, small_pieces: None, gptj
):
    adapter = make_adapter(HF, "adapter", **KINDS[kind])
    expected = merged_by_peft(HF, adapter)
    done = gptj("convert", HF, "--adapter", adapter, "--to", "hf", "--json")
    assert done.code == 0, done.stderr
    assert_same(converted("converted-hf"), expected)
    begun = load_tensors(HF / "model.safetensors")
    changed = {name for name in begun if not np.array_equal(begun[name], expected[name])}
    assert changed, "the adapter does something"
    assert done.json["adapter"]["files"]["adapter_model.safetensors"]["bytes"] > 0


@pytest.mark.parametrize(
    "to", ["tf", *(pytest.param(to, marks=pytest.mark.full) for to in ("keras", "cs"))]
)
def test_into_and_out_of_every_format(to: str, workdir: Path, small_pieces: None, gptj):
    """The base's layout decides which factor is cut."""
    adapter = make_adapter(HF, "adapter", target_modules=["q_proj", "fc_in", "fc_out"],
                           modules_to_save=["lm_head"])  # fmt: skip
    expected = merged_by_peft(HF, adapter)
    assert gptj("convert", HF, "--adapter", adapter, "--to", to, "--out", "merged").code == 0
    assert gptj("verify", "merged", "--level", "weights").code == 0
    assert gptj("convert", "merged", "--to", "hf", "--out", "back").code == 0
    assert_same(converted("back"), expected)
    assert gptj("convert", HF, "--to", to, "--out", "base").code == 0
    assert gptj("convert", "base", "--adapter", adapter, "--to", "hf", "--out", "late").code == 0
    assert_same(converted("late"), expected)
    assert gptj("verify", "late", "--level", "weights").code == 0


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_in_16_bits_and_in_a_bin(stored: Any, file: str, workdir: Path, gptj):
    adapter = make_adapter(HF, "adapter", dtype=stored)
    if file.endswith("bin"):
        path = adapter / "adapter_model.safetensors"
        tensors = {n: torch.from_numpy(v.astype(np.float32)).to(stored)
                   for n, v in load_tensors(path).items()}  # fmt: skip
        torch.save(tensors, adapter / file)
        path.unlink()
    assert gptj("convert", HF, "--adapter", adapter, "--to", "hf").code == 0
    assert_same(converted("converted-hf"), merged_by_peft(HF, adapter))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_base_in_16_bits_is_merged_in_32(dtype: str, workdir: Path, gptj):
    """The merge equals peft's with the model in float32; kept in 16 bits, it is rounded once."""
    base = make_checkpoint(workdir / "base", dtype=dtype)
    adapter = make_adapter(base, "adapter")
    expected = merged_by_peft(base, adapter)
    options = ("convert", base, "--adapter", adapter, "--to", "hf")
    assert gptj(*options, "--dtype", "float32", "--out", "wide").code == 0
    assert_same(converted("wide"), expected)
    assert gptj(*options, "--out", "kept").code == 0
    assert gptj("verify", "kept", "--level", "weights").code == 0
    kept = converted("kept")
    for name, values in kept.items():
        rounded = torch.from_numpy(expected[name]).to(getattr(torch, dtype)).float().numpy()
        assert values.astype(np.float32).tobytes() == rounded.tobytes(), name


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rank=st.integers(1, 64),
    alpha=st.floats(0.1, 100),
    targets=st.sets(
        st.sampled_from(["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]), min_size=1
    ),
    stabilized=st.booleans(),
)
def test_any_rank_alpha_and_layers(
    rank: int, alpha: float, targets: set[str], stabilized: bool, workdir: Path, gptj
):
    shutil.rmtree("adapter", ignore_errors=True)
    adapter = make_adapter(HF, "adapter", r=rank, lora_alpha=alpha,
                           target_modules=sorted(targets), use_rslora=stabilized)  # fmt: skip
    done = gptj("convert", HF, "--adapter", adapter, "--to", "hf", "--force", "--quiet")
    assert done.code == 0, done.stderr
    assert_same(converted("converted-hf"), merged_by_peft(HF, adapter))


def test_verify_holds_the_result_against_base_and_adapter(workdir: Path, gptj):
    adapter = make_adapter(HF, "adapter")
    base = Path(shutil.copytree(HF, "base"))
    assert gptj("convert", base, "--adapter", adapter, "--to", "tf").code == 0
    done = gptj("verify", "--level", "logits")
    assert done.code == 0, done.stderr
    assert "with" in done.stderr
    assert "adapter" in done.stderr
    manifest = json.loads(Path("converted/manifest.json").read_text())
    stated = manifest["source"]["adapter"]
    assert (stated["r"], stated["lora_alpha"], stated["targets"]) == (8, 8, ["q_proj", "v_proj"])
    # Moved elsewhere, it is named.
    shutil.move("adapter", "moved")
    assert gptj("verify", "--level", "weights").code == 1
    assert gptj("verify", "--level", "weights", "--adapter", "moved").code == 0
    # An adapter that has changed since judges nothing; another one differs.
    make_adapter(HF, "adapter", r=4)
    changed = gptj("verify", "--level", "weights")
    assert changed.code == 1
    assert "has changed" in changed.stderr
    assert gptj("verify", "--level", "weights", "--adapter", "adapter", "--against", HF).code == 3
    shutil.rmtree("adapter")
    shutil.move("moved", "adapter")
    prefix = Path("converted/tf_model.ckpt.data-00000-of-00001")
    damaged = bytearray(prefix.read_bytes())
    damaged[len(damaged) // 2] ^= 64
    prefix.write_bytes(damaged)
    assert gptj("verify", "--level", "weights").code == 3


def test_dry_run_force_and_resume_are_those_of_any_conversion(workdir: Path, gptj):
    adapter = make_adapter(HF, "adapter")
    options = ("convert", HF, "--adapter", adapter, "--to", "tf")
    done = gptj(*options, "--dry-run", "--json")
    assert done.code == 0
    assert done.json["adapter"]["r"] == 8
    assert not Path("converted").exists()
    assert gptj(*options).code == 0
    first = Path("converted/tf_model.ckpt.data-00000-of-00001").read_bytes()
    assert gptj(*options).code == 2
    assert gptj(*options, "--resume").code == 0
    assert gptj("convert", HF, "--to", "tf", "--resume").code == 2, "another conversion"
    assert gptj(*options, "--force").code == 0
    assert Path("converted/tf_model.ckpt.data-00000-of-00001").read_bytes() == first
    assert gptj(*options, "--out", adapter / "x").code == 0
    assert gptj(*options, "--out", adapter, "--force").code == 2


def _edited(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type is 'IA3'"]),
        ({"use_dora": True, "bias": "all"}, ["use_dora is 'True'", "bias is 'all'"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights is 'pissa'"]),
        ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
        ({"lora_bias": True}, ["lora_bias"]),
        ({"something_new": {"a": 1}}, ["something_new"]),
        ({"r": 0, "lora_alpha": "x"}, ["r is '0'", "lora_alpha is 'x'"]),
        ({"r": True}, ["r is 'True'"]),
        ({"target_modules": None}, ["target_modules is 'None'"]),
        ({"target_modules": ["query_key_value"]}, ["no dense layer of GPT-J has such a name"]),
        ({"target_modules": ["wte", "q_proj"]}, ["transformer.wte", "dense layers"]),
        ({"target_modules": "("}, ["target_modules is '('"]),
        ({"rank_pattern": {"(": 3}}, ["rank_pattern"]),
        ({"modules_to_save": ["score"]}, ["'score'"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
    ],
)
def test_what_is_not_implemented_is_named(fields: dict, words: list[str], workdir: Path, gptj):
    adapter = make_adapter(HF, "adapter")
    _edited(adapter, **fields)
    done = gptj("convert", HF, "--adapter", adapter, "--to", "tf")
    assert done.code == 2, done.stderr
    for word in words:
        assert word in done.stderr
    assert not Path("converted").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 4}, ["lora_A.weight' has shape [8, 64], expected [4, 64]", "12 problem"]),
        ({"target_modules": ["q_proj"]}, ["lora_A.weight' belongs to no layer", "6 problem"]),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, ["k_proj.lora_B.weight' is missing"]),
        ({"modules_to_save": ["lm_head"]}, ["lm_head.weight' is missing"]),
    ],
)
def test_tensors_that_the_settings_do_not_call_for_are_named(
    fields: dict, words: list[str], workdir: Path, gptj
):
    adapter = make_adapter(HF, "adapter")
    _edited(adapter, **fields)
    done = gptj("convert", HF, "--adapter", adapter, "--to", "tf")
    assert done.code == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_an_adapter_of_another_model_is_refused(workdir: Path, gptj):
    for fields, words in (
        (
            {"n_embd": 64, "n_head": 4, "n_layer": 4},
            "h.3.attn.q_proj.lora_A.weight' belongs to no layer",
        ),
        ({"n_embd": 96, "n_head": 4, "n_layer": 3}, "lora_A.weight' has shape [8, 96], expected"),
    ):
        shutil.rmtree("other", ignore_errors=True)
        other = make_checkpoint(workdir / "other", **fields)
        done = gptj("convert", HF, "--adapter", make_adapter(other, "adapter"), "--to", "tf")
        assert done.code == 1
        assert words in done.stderr
    record = {
        "repository": "EleutherAI/gpt-j-6b", "revision": None, "commit": "a" * 40, "files": {},
    }  # fmt: skip
    base = Path(shutil.copytree(HF, "base"))
    (base / ".gptj-download.json").write_text(json.dumps(record))
    adapter = make_adapter(HF, "adapter-2")
    _edited(adapter, base_model_name_or_path="somebody/another-gptj")
    done = gptj("convert", base, "--adapter", adapter, "--to", "tf")
    assert done.code == 2
    assert "was made for somebody/another-gptj" in done.stderr
    _edited(adapter, base_model_name_or_path="eleutherai/GPT-J-6B")
    done = gptj("convert", base, "--adapter", adapter, "--to", "tf")
    assert done.code == 0
    assert "note: the adapter was made for" not in done.stderr
    # What a conversion says of its source counts for the result, too.
    _edited(adapter, base_model_name_or_path="somebody/another-gptj")
    assert gptj("convert", base, "--to", "tf", "--out", "plain").code == 0
    assert gptj("convert", "plain", "--adapter", adapter, "--to", "hf").code == 2
    done = gptj("convert", HF, "--adapter", adapter, "--to", "hf")
    assert done.code == 0
    assert "note: the adapter was made for somebody/another-gptj" in done.stderr


def test_a_tied_head_is_not_changed_alone(workdir: Path, gptj):
    tied = make_checkpoint(workdir / "tied", tie_word_embeddings=True)
    adapter = make_adapter(tied, "adapter", r=4)
    assert gptj("convert", tied, "--adapter", adapter, "--to", "hf").code == 0
    assert_same(converted("converted-hf"), merged_by_peft(tied, adapter))
    _edited(adapter, modules_to_save=["lm_head"])
    done = gptj("convert", tied, "--adapter", adapter, "--to", "tf")
    assert done.code == 2
    assert "lm_head is changed, but this model ties" in done.stderr


def test_a_folder_with_an_adapter_alone_says_what_to_do(workdir: Path, gptj):
    adapter = make_adapter(HF, "adapter")
    for command in (("convert", adapter, "--to", "tf"), ("inspect", adapter)):
        done = gptj(*command)
        assert done.code == 1
        assert f"gptj convert {HF} --adapter adapter --to hf" in done.stderr
    _edited(adapter, base_model_name_or_path=None)
    assert "gptj convert BASE --adapter" in gptj("convert", adapter, "--to", "tf").stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "peft"), "--adapter goes with --to tf or --to hf or --to keras or --to cs"),
        (("--to", "tf", "--optimizer-state"), "exclude each other"),
    ],
)
def test_what_an_adapter_does_not_go_with(options: tuple, words: str, workdir: Path, gptj):
    done = gptj("convert", HF, "--adapter", "adapter", *options)
    assert done.code == 2
    assert words in done.stderr
    missing = gptj("convert", HF, "--adapter", "adapter", "--to", "tf")
    assert missing.code == 1
    assert "expected a folder with adapter_config.json" in missing.stderr


LORA = ("--set", "model.lora.rank=8", "--set", "model.lora.alpha=8",
        "--set", "model.lora.targets=[q_proj, v_proj]")  # fmt: skip
BEGIN = ("train", "--params", "params.yaml", "--init-from", "hf", "--quiet")


@adamw
@pytest.mark.parametrize("execution", ["resident", "streaming"])
def test_training_continues_an_adapter(golden_run: Path, execution: str, gptj):
    """At a learning rate of 0 the run is the merged model; otherwise it trains A and B further."""
    adapter = make_adapter(Path("hf"), "adapter")
    own = ("--adapter", adapter, "--execution", execution, *LORA)
    still = ("--set", "optimizer.learning_rate=0", "--max-steps", 1)
    done = gptj(*BEGIN, *own, *still)
    assert done.code == 0, done.stderr
    assert gptj("convert", "model_dir", "--to", "peft").code == 0
    before = load_tensors(adapter / "adapter_model.safetensors")
    after = load_tensors(Path("converted-peft/adapter_model.safetensors"))
    assert set(before) == set(after)
    for name, values in before.items():
        assert values.tobytes() == after[name].tobytes(), name
    assert gptj("convert", "model_dir", "--to", "hf").code == 0
    merged = merged_by_peft(Path("hf"), adapter)
    for name, values in converted("converted-hf").items():
        np.testing.assert_allclose(values, merged[name], rtol=0, atol=1e-7)
    # And on, from what it was: the first loss is that of the merged model.
    assert gptj("convert", "hf", "--adapter", adapter, "--to", "tf", "--out", "merged").code == 0
    rate = ("--set", "optimizer.learning_rate=0.01", "--max-steps", 2)
    assert gptj(*BEGIN, *own, *rate, "--model-dir", "onward").code == 0
    whole = ("train", "--params", "params.yaml", "--init-from", "merged", "--quiet")
    assert gptj(*whole, *still, "--model-dir", "whole").code == 0
    losses = [json.loads(Path(d, "metrics.jsonl").read_text().splitlines()[0])["loss"]
              for d in ("onward", "whole")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    source = BundleSource(Path("onward/model.ckpt-2"))
    moved = read_tensor(source, "gptj_decoder/0/attn/q_proj/q_proj/kernel/lora_b")
    name = "base_model.model.transformer.h.0.attn.q_proj.lora_B.weight"
    assert 0 < np.abs(moved.T - before[name]).max() < 0.05


@adamw
def test_a_run_trains_the_adapter_that_it_is_given_or_says_so(golden_run: Path, gptj):
    adapter = make_adapter(Path("hf"), "adapter", r=4, lora_alpha=6, use_rslora=True)
    done = gptj(*BEGIN, "--adapter", adapter, *LORA, "--max-steps", 1)
    assert done.code == 2
    assert "is of rank 4, alpha 12, for q_proj, v_proj, and the YAML has rank 8" in done.stderr
    settings = re.findall(r"--set (?:'([^']+)'|(\S+))", done.stderr.split("hint:")[1])
    named = [option for pair in settings for option in ("--set", pair[0] or pair[1])]
    for only in ("--validate-only", "--dry-run"):
        assert gptj(*BEGIN, "--adapter", adapter, only).code == 2
        assert gptj(*BEGIN, "--adapter", adapter, *named, only).code == 0
    done = gptj(*BEGIN, "--adapter", adapter, "--max-steps", 1)
    assert "leaves model.lora out" in done.stderr
    head = make_adapter(Path("hf"), "head", modules_to_save=["lm_head"], layers_to_transform=[0])
    done = gptj(*BEGIN, "--adapter", head, *LORA, "--max-steps", 1)
    assert done.code == 2
    assert "replaces lm_head.weight, lm_head.bias" in done.stderr
    assert "adapts only some blocks" in done.stderr
    assert not Path("model_dir/model.ckpt-1.index").exists()
    alone = ("train", "--params", "params.yaml", "--adapter", adapter, *named)
    assert "--init-from" in gptj(*alone, "--max-steps", 1).stderr


@adamw
def test_our_adapter_names_its_base_and_converts_back(
    golden_run: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    """An adapter is written, loaded by the library and merged by both, for three kinds of base."""
    rate = ("--set", "optimizer.learning_rate=0.01", "--max-steps", 2)
    assert gptj(*BEGIN, *LORA, *rate).code == 0
    done = gptj("convert", "model_dir", "--to", "peft", "--json")
    assert done.json["base"] == str(Path("hf").absolute())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for its search for a tokenizer
    model = peft.AutoPeftModelForCausalLM.from_pretrained("converted-peft")
    expected = {n: v.numpy() for n, v in model.merge_and_unload().state_dict().items()}
    back = ("convert", "hf", "--adapter", "converted-peft", "--to", "hf", "--out", "back")
    assert gptj(*back).code == 0
    assert_same(converted("back"), expected)
    assert gptj("convert", "hf", "--to", "tf").code == 0
    begin = ("train", "--params", "params.yaml", "--init-from", "converted", "--quiet", *LORA)
    assert gptj(*begin, *rate, "--model-dir", "second").code == 0
    out = ("--to", "peft", "--out", "second-peft")
    assert gptj("convert", "second", *out, "--json").json["base"] == str(Path("hf").absolute())
    config = json.loads(Path("second-peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path("hf").absolute())
    # A run of before, whose config.json does not say it.
    path = Path("second/config.json")
    values = json.loads(path.read_text())
    assert values.pop("_name_or_path")
    path.write_text(json.dumps(values))
    done = gptj("convert", "second", *out, "--force")
    assert done.code == 0
    assert "does not say which model it started from" in done.stderr
    assert json.loads(Path("second-peft/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] is None  # fmt: skip
