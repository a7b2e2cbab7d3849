"""LoRA and frozen layers in `gptj train`: what changes, what does not, and what comes out."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.source import read_tensor
from runner.cli.root import main
from tests.conftest import GOLDEN_RUNS, load_tensors

adamw = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
BEGIN = ("train", "--init-from", "hf", "--params", "params.yaml", "--quiet",
         "--set", "optimizer.learning_rate=0.01")  # fmt: skip
LORA = ("--set", "model.lora.rank=4", "--set", "model.lora.targets=[q_proj, fc_out]")
ADAPTED = re.compile(r"/(q_proj|dense_layer_[135])/kernel$")
ADDED = re.compile(r"/(lora_a|lora_b|lora_base)$")
SLOT = re.compile(r"/AdamW(_1)?$")


#: Of the run that the tests share.
SHARED = (*LORA, "--set", "model.lora.alpha=6", "--set", "model.residual_dropout_rate=0.1",
          "--set", "train_input.shuffle=true")  # fmt: skip


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model_dir has trained an adapter for three steps."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    shutil.copytree(GOLDEN_RUNS / "adamw", folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main([*BEGIN, *SHARED, "--max-steps", "3"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def lora_run(shared_run: Path, workdir: Path) -> Path:
    """A copy of the trained folder, which is the current folder."""
    folder = shutil.copytree(shared_run, workdir / "run")
    os.chdir(folder)
    return folder


def _tensors(step: int, folder: str = "model_dir") -> dict[str, np.ndarray]:
    source = BundleSource(Path(folder) / f"model.ckpt-{step}")
    return {name: read_tensor(source, name) for name in source.tensors}


def _begun(gptj) -> dict[str, np.ndarray]:
    """The weights that the runs begin with, by TF name."""
    assert gptj("convert", "hf", "--to", "tf", "--out", "begun", "--quiet").code == 0
    source = BundleSource(Path("begun/tf_model.ckpt"))
    return {n: read_tensor(source, n) for n in source.tensors if n != "global_step"}


def _logits(model) -> np.ndarray:
    import torch

    ids = torch.arange(48)[None] * 37 % 512
    with torch.no_grad():
        return model.eval()(ids).logits.double().numpy()


def test_only_the_adapter_is_trained_and_the_checkpoint_holds_merged_kernels(lora_run, gptj):
    begun, found = _begun(gptj), _tensors(3)
    for name, before in begun.items():
        if not ADAPTED.search(name):
            assert np.array_equal(found[name], before), name
            continue
        a, b = (found[f"{name}/lora_{letter}"] for letter in "ab")
        assert np.array_equal(found[f"{name}/lora_base"], before), name
        assert a.shape[1] == b.shape[0] == 4
        assert b.any(), name
        expected = before.astype(np.float64) + 6 / 4 * a.astype(np.float64) @ b
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    with_slots = {SLOT.sub("", n) for n in found if SLOT.search(n)}
    assert with_slots == {n for n in found if re.search(r"/lora_[ab]$", n)}


@adamw
def test_an_adapter_that_has_not_been_trained_changes_nothing(golden_run, gptj):
    still = ("--set", "optimizer.learning_rate=0", "--max-steps", 1)
    assert gptj(*BEGIN, *still, "--model-dir", "full").code == 0
    assert gptj(*BEGIN, *LORA, *still).code == 0
    begun, found = _begun(gptj), _tensors(1)
    for name, before in begun.items():
        assert np.array_equal(found[name], before), name
    losses = [
        json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for folder in ("full", "model_dir")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)


def test_a_run_in_two_parts_is_the_run_in_one(lora_run, gptj):
    assert gptj("train", "--max-steps", 5, "--quiet").code == 0
    assert gptj(*BEGIN, *SHARED, "--max-steps", 5, "--model-dir", "whole").code == 0
    found, expected = _tensors(5), _tensors(5, "whole")
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


def test_exports_agree_merged_and_as_an_adapter_that_peft_loads(lora_run, gptj):
    from peft import PeftModel
    from transformers import GPTJForCausalLM

    done = gptj("convert", "model_dir", "--to", "hf")
    assert done.code == 0
    assert "adapter merged" in done.stderr
    done = gptj("convert", "model_dir", "--to", "peft", "--json")
    assert done.json["output"] == "converted-peft"
    assert done.json["targets"] == ["q_proj", "fc_out"]
    assert gptj("verify", "converted-hf", "--against", "model_dir", "--level", "weights").code == 0

    base = GPTJForCausalLM.from_pretrained("hf")
    before = _logits(base)
    merged = _logits(GPTJForCausalLM.from_pretrained("converted-hf"))
    adapted = _logits(PeftModel.from_pretrained(base, "converted-peft"))
    assert np.abs(merged - before).max() > 0.01
    np.testing.assert_allclose(adapted, merged, atol=2e-5)
    # By hand, of the files alone: what each kernel has become is base and update.
    update = load_tensors(Path("converted-peft/adapter_model.safetensors"))
    weights, begun = (load_tensors(Path(p, "model.safetensors")) for p in ("converted-hf", "hf"))
    for name in begun:
        stem = "base_model.model." + name.removesuffix("weight")
        change = np.zeros(1, np.float32)
        if f"{stem}lora_A.weight" in update:
            pair = (update.pop(f"{stem}lora_{letter}.weight") for letter in "BA")
            change = 6 / 4 * np.matmul(*pair)
        np.testing.assert_allclose(weights[name], begun[name] + change, atol=1e-6)
    assert not update, "nothing but adapters of the model's layers"


def test_the_adapter_has_a_card(lora_run, gptj):
    config = json.loads(Path("model_dir/config.json").read_text())
    Path("model_dir/README.md").write_text("---\nlicense: mit\n---\nOf the base.\n")
    Path("model_dir/LICENSE").write_text("Mine.")
    assert gptj("convert", "model_dir", "--to", "peft", "--out", "unnamed").code == 0
    data = ModelCard.load("unnamed/README.md").data.to_dict()
    assert data == {
        "license": "mit",
        "tags": ["gptj", "lora"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
    }
    Path("model_dir/config.json").write_text(json.dumps(config | {"_name_or_path": "me/base"}))
    assert gptj("convert", "model_dir", "--to", "peft").code == 0
    found = ModelCard.load("converted-peft/README.md")
    assert found.data.base_model == "me/base"
    assert found.data.to_dict()["base_model_relation"] == "adapter"
    assert "| Trained with | gptj, up to step 3 |" in found.text
    assert found.text.endswith("Of the base.\n")
    assert Path("converted-peft/LICENSE").read_text() == "Mine."
    assert gptj("convert", "model_dir", "--to", "hf").code == 0
    found = ModelCard.load("converted-hf/README.md")
    assert found.data.to_dict()["base_model_relation"] == "finetune"
    assert "The LoRA adapter of the run is merged into its kernels." in found.text


@adamw
def test_what_is_frozen_stays_bit_for_bit(golden_run, gptj):
    frozen = ("embedding_weights", "decoder/[01]/.*kernel", "lm_head")
    settings = ("--set", f"model.frozen={json.dumps(frozen)}")
    assert gptj(*BEGIN, *settings, "--max-steps", 2).code == 0
    begun, found = _begun(gptj), _tensors(2)
    for name, before in begun.items():
        stays = any(re.search(p, name) for p in frozen)
        assert np.array_equal(found[name], before) == stays, name
        assert (f"{name}/AdamW" in found) != stays


def test_a_full_run_begins_with_the_merged_weights(lora_run, gptj):
    begin = ("train", "--checkpoint-path", "model_dir", "--params", "params.yaml", "--quiet")
    still = ("--set", "optimizer.learning_rate=0", "--max-steps", 1)
    done = gptj(*begin, *still, "--model-dir", "next")
    assert done.code == 0
    before, after = _tensors(3), _tensors(1, "next")
    assert not any(ADDED.search(name) for name in after)
    kernels = [name for name in after if ADAPTED.search(name)]
    assert len(kernels) == 6
    for name in kernels:
        assert np.array_equal(after[name], before[name]), name


@adamw
def test_planned_memory_counts_weights_once_and_slots_of_the_adapter_only(golden_run, gptj):
    def planned(*settings: str) -> dict:
        return gptj(*BEGIN, *settings, "--validate-only", "--json").json

    full, lora = planned(), planned(*LORA)
    adapter = 3 * (4 * (64 + 64) + 4 * (256 + 64))
    assert lora["trained_parameters"] == adapter
    assert full["trained_parameters"] == full["parameters"] == lora["parameters"]
    saved = full["planned_rss_bytes"] - lora["planned_rss_bytes"]
    assert saved == 16 * full["parameters"] - 20 * adapter
    # Adapters are frozen by the same patterns.
    frozen = planned(*LORA, "--set", "model.frozen=decoder/0/")
    assert frozen["trained_parameters"] == adapter * 2 // 3


@adamw
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.frozen=lm_haed", ("model.frozen", "'lm_haed'", "gptj inspect")),
        ("model.frozen=.", ("nothing to train",)),
        ("model.frozen=[(]", ("model.frozen is '('", "expected a regular expression")),
        ("model.lora.rnak=4", ("model.lora.rnak", "did you mean 'rank'")),
        ("model.lora.rank=0", ("model.lora.rank", "greater than 0")),
        ("model.lora.targets=[query]", ("model.lora.targets[0]", "'q_proj'")),
    ],
)
def test_parameters_that_cannot_be_are_named(golden_run, setting: str, words, gptj):
    done = gptj(*BEGIN, "--set", setting, "--max-steps", 1)
    assert done.code == 2, done.stderr
    for word in words:
        assert word in done.stderr
    assert not Path("model_dir/model.ckpt-1.index").exists()


@adamw
def test_what_has_no_adapter_is_refused(golden_run, gptj):
    done = gptj("convert", "hf", "--to", "peft")
    assert done.code == 2
    assert "holds no adapter" in done.stderr
    assert gptj("convert", "hf", "--to", "peft", "--dtype", "float16").code == 2
    assert not Path("converted-peft").exists()


@adamw
def test_a_streamed_adapter_is_evaluated_as_its_checkpoint_is(golden_run: Path, gptj):
    evaluated = (*LORA, "--execution", "streaming", "--mode", "train_and_eval", "--max-steps", 2,
                 "--set", "runconfig.save_checkpoints_steps=1")  # fmt: skip
    assert gptj(*BEGIN, *evaluated).code == 0
    rows = map(json.loads, Path("model_dir/metrics.jsonl").read_text().splitlines())
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    for step in (1, 2):
        done = gptj("eval", "--model", f"model_dir@{step}", "--execution", "resident", "--json")
        assert losses[step] == pytest.approx(done.json["metrics"]["loss"], rel=1e-6)
    assert losses[1] != losses[2]
