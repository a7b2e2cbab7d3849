"""`gptj train --backend jax`: a model divided among eight virtual devices, in processes of its own:
Keras has one backend in each."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runner
from golden.tolerances import TRAINING
from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.config import GPTJConfig
from gptj_model.source import read_tensor
from runner.cli.root import main
from tests.conftest import GOLDEN_RUNS, eight_devices

#: Where TensorFlow is not installed.
_PROGRAM = """
import json, sys
sys.modules["tensorflow"] = None
from runner.cli.root import main
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps(codes))
"""
#: Every number is as exact as float32 sums in another order are.
ROUNDING = 1e-5
BEGIN = ("train", "--init-from", "hf", "--params", "params.yaml")


def _on_jax(*commands: tuple[object, ...]) -> tuple[list[int], str]:
    """Run commands one after the other, in one process with eight virtual devices.

    Returns:
        Their exit codes, and what they wrote to stderr.
    """
    lists = [list(map(str, command)) for command in commands]
    command = [sys.executable, "-c", _PROGRAM, json.dumps(lists)]
    done = subprocess.run(command, env=eight_devices(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def _mesh(batch: int, model: int) -> tuple[str, str]:
    return "--set", f"runconfig.mesh=[{batch},{model}]"


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _assert_same(found: Path, expected: Path, step: int, *, steps: int = 20) -> None:
    """Losses and norms of the last steps, and the checkpoint of one."""
    ours, theirs = ([r for r in _rows(f) if "loss" in r][-steps:] for f in (found, expected))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for key in ("loss", "learning_rate", "unclipped_grad_norm"):
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], rel=ROUNDING), key
    ours, theirs = (BundleSource(f / f"model.ckpt-{step}") for f in (found, expected))
    assert ours.tensors == theirs.tensors
    for name in theirs.tensors:
        delta = np.abs(read_tensor(ours, name).astype(float) - read_tensor(theirs, name))
        assert delta.max() <= TRAINING, name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of the recorded case: on 2 × 4 devices, on one, one interrupted, and one
    that TensorFlow began."""
    folder = tmp_path_factory.mktemp("jax") / "adamw"
    shutil.copytree(GOLDEN_RUNS / "adamw", folder)
    drop = ("--set", "model.residual_dropout_rate=0.1")
    hard = (*drop, "--set", "optimizer.grad_accum_steps=2", "--set",
            "optimizer.moments_dtype=bfloat16")  # fmt: skip
    again = (*drop, "--set", "model.recompute=true")
    shard = ("--set", "runconfig.shard_weights=true")
    lora = ("--set", "model.lora.rank=2", "--quiet")
    jax = ("--backend", "jax")  # the runs that TensorFlow began say otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before = signal.getsignal(signal.SIGTERM)
        assert main([*BEGIN, "--model-dir", "tf_first", "--max-steps", "10", "--quiet"]) == 0
        first = (*BEGIN, *lora, "--model-dir", "lora_tf", "--max-steps")
        assert main([*first, "2"]) == 0
        shutil.copytree("lora_tf", "lora_jax")
        assert main([*first, "5"]) == 0
        signal.signal(signal.SIGTERM, before)
        codes, told = _on_jax(
            (*BEGIN, *_mesh(2, 4), "--model-dir", "divided", "--mode", "train_and_eval"),
            (*BEGIN, *_mesh(1, 1), "--model-dir", "whole", "--quiet"),
            ("train", "--model-dir", "tf_first", *jax, *_mesh(2, 4), "--max-steps", 20, "--quiet"),
            (*BEGIN, *_mesh(4, 2), *hard, "--model-dir", "unbroken", "--max-steps", 4, "--quiet"),
            (*BEGIN, *_mesh(4, 2), *hard, "--model-dir", "broken", "--max-steps", 2, "--quiet"),
            ("train", "--model-dir", "broken", "--max-steps", 4, "--quiet"),
            (*BEGIN, *_mesh(4, 4), "--model-dir", "large"),
            (*BEGIN, *_mesh(4, 2), *shard, "--model-dir", "sharded"),
            (*BEGIN, *_mesh(2, 1), *drop, "--model-dir", "kept", "--max-steps", 4, "--quiet"),
            (*BEGIN, *_mesh(2, 1), *again, "--model-dir", "again", "--max-steps", 4, "--quiet"),
            ("train", "--model-dir", "lora_jax", *jax, *_mesh(2, 1), "--max-steps", 5, "--quiet"),
            (*BEGIN, *lora, *_mesh(1, 1), "--model-dir", "lora_new", "--max-steps", 2),
            ("eval", "--model", "whole", "--quiet"),
            ("eval", "--model", "whole", "--execution", "streaming", "--quiet"),
            ("train", "--model-dir", "whole", "--mode", "eval_all", "--quiet"),
            (*BEGIN, *_mesh(1, 1), "--model-dir", "compiled", "--compile-only"),
            ("train", "--model-dir", "whole", "--execution", "streaming"),
            ("eval", "--model", "whole", "--backend", "tensorflow"),
        )
    assert codes == [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2], told
    (folder / "told").write_text(told)
    return folder


def test_eight_devices_are_one(runs: Path):
    _assert_same(runs / "divided", runs / "whole", 20)
    recorded = json.loads((runs / "reference.json").read_text())["summaries"]["loss"]
    rows = [row for row in _rows(runs / "divided") if "loss" in row]
    for row in rows:
        assert row["loss"] == pytest.approx(recorded[str(row["step"])], rel=TRAINING)
    assert len(rows) == 20


def test_each_device_holds_what_was_planned(runs: Path, gptj, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(runs)
    planned = gptj(*BEGIN, "--backend", "jax", *_mesh(2, 4), "--validate-only", "--json").json
    found = re.search(r"2 × 4 devices .* hold ([\d,]+) bytes", (runs / "told").read_text())
    assert found
    held = int(found[1].replace(",", ""))
    size = planned["bytes_per_device"]
    assert held == size["weights"] + size["slots"]
    assert held < 12 * planned["parameters"] / 3.9  # 12 bytes each; norms are not divided


def test_sharded_weights_are_the_same_weights(runs: Path, gptj, monkeypatch: pytest.MonkeyPatch):
    _assert_same(runs / "sharded", runs / "whole", 20)
    monkeypatch.chdir(runs)
    planned = gptj(*BEGIN, "--backend", "jax", *_mesh(4, 2), "--set",
                   "runconfig.shard_weights=true", "--validate-only", "--json").json  # fmt: skip
    size = planned["bytes_per_device"]
    assert f"hold {size['weights'] + size['slots']:,} bytes" in (runs / "told").read_text()
    # A bias that is divided along the model has no other axis.
    assert size["weights"] * 8 < 1.03 * 4 * planned["parameters"]


def test_recomputed_activations_are_the_kept_ones(runs: Path):
    """Dropout masks included."""
    _assert_same(runs / "again", runs / "kept", 4, steps=4)


def test_an_adapter_goes_on(runs: Path):
    """Two steps on TensorFlow and three on JAX are five on TensorFlow."""
    _assert_same(runs / "lora_jax", runs / "lora_tf", 5, steps=3)


def test_an_adapter_starts_from_the_same_values(runs: Path):
    found, expected = ([r["loss"] for r in _rows(runs / n)] for n in ("lora_new", "lora_tf"))
    assert found == pytest.approx(expected[:2], rel=ROUNDING)


def test_a_run_that_was_interrupted_is_the_same_bits(runs: Path):
    ours, theirs = (BundleSource(runs / name / "model.ckpt-4") for name in ("broken", "unbroken"))
    assert ours.tensors == theirs.tensors
    for name in theirs.tensors:
        np.testing.assert_array_equal(read_tensor(ours, name), read_tensor(theirs, name), name)


def test_each_backend_resumes_from_the_others_checkpoint(
    runs: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    """Ten steps on each backend give the losses of twenty steps on one."""
    _assert_same(runs / "tf_first", runs / "whole", 20)
    monkeypatch.chdir(runs)
    Path("jax_first").mkdir()
    for path in (*Path("divided").glob("model.ckpt-10.*"), Path("divided/config.json")):
        shutil.copy(path, "jax_first")
    common = ("--model-dir", "jax_first", "--params", "params.yaml", "--quiet")
    assert gptj("train", *common).code == 0
    _assert_same(runs / "jax_first", runs / "whole", 20, steps=10)


def test_evaluation_while_training(runs: Path):
    recorded = json.loads((runs / "reference.json").read_text())["eval_after_training"]
    loss = next(float(pair.split(" = ")[1]) for pair in recorded[1].split(", ") if "loss" in pair)
    evaluated = [row for row in _rows(runs / "divided") if "eval/loss" in row]
    assert evaluated[-1]["eval/loss"] == pytest.approx(loss, rel=TRAINING)


REFUSED = {
    "no heads": (_mesh(1, 3), "3 does not divide the 4 heads, the 512 of transformer.wte.weight"),
    "batch": (_mesh(3, 1), "train_input.batch_size is 4, expected a multiple of 3"),
    "form": (("--set", "runconfig.mesh=[0,4]"), "runconfig.mesh[0] is '0'"),
    "streaming": (("--execution", "streaming"), "does not know runconfig.execution streaming"),
    "device": (("--set", "runconfig.device=/gpu:0"), "does not know runconfig.device /gpu:0"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_what_jax_cannot_do_is_refused(golden_run: Path, case: str, gptj):
    options, expected = REFUSED[case]
    done = gptj(*BEGIN, "--backend", "jax", "--validate-only", *options)
    assert done.code == 2
    assert expected in done.stderr


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_process_computes_with_one_backend(golden_run: Path, gptj):
    done = gptj(*BEGIN, "--backend", "jax", *_mesh(1, 1))
    assert done.code == 2
    assert "Keras computes with tensorflow in this process, expected jax" in done.stderr
    assert not Path("model_dir").exists()


def test_too_few_devices(runs: Path):
    assert "runconfig.mesh is 4 × 4, 16 devices, and JAX has 8 (cpu)" in (runs / "told").read_text()


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_block_of_the_6b_on_eight_devices_by_its_shape(golden_run: Path, gptj):
    folder = Path("records").resolve()
    of_6b = Path(runner.__file__).parent / "configs/params_gptj_6b_continued.yaml"
    settings = {
        "train_input.data_dir": folder,
        "train_input.max_sequence_length": 32,
        "model.num_hidden_layers": 1,
        "runconfig.keep_checkpoint_max": 1,
    }  # its checkpoints need 7 GB; fmt: skip
    options = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    done = gptj("train", "--params", of_6b, "--backend", "jax", *_mesh(1, 8), *options,
                "--validate-only", "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    config = replace(GPTJConfig.preset("6b"), n_layer=1)
    # What is not divided: norms, and the biases that come after a sum over the devices.
    whole = config.n_embd * (3 * config.n_layer + 2)
    weights = 4 * ((done.json["parameters"] - whole) // 8 + whole)
    assert done.json["bytes_per_device"] == {
        "weights": weights, "gradients": weights, "slots": 2 * weights, "total": 4 * weights,
    }  # fmt: skip
