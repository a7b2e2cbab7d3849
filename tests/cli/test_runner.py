"""The reference's command line, 16-bit training, and runs that begin from nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from golden.tolerances import TRAINING
from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.config import GPTJConfig
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import variables
from gptj_model.source import read_tensor
from gptj_model.tensors import table
from runner import run as reference
from runner.cli.root import main
from runner.config.params_file import load_params, validate
from runner.training.weights.initialize import initialize
from tests.cli.test_train import MEASURED
from tests.conftest import Outcome

adamw = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
TRAIN = ("--mode", "train", "--params", "params.yaml", "--model_dir")
#: Gradients overflow float16 in the first steps, and no more then.
HALF = (
    "--set", "model.mixed_precision=true", "--set", "optimizer.loss_scaling_factor=dynamic",
    "--set", "optimizer.initial_loss_scale=1e8", "--set", "optimizer.max_loss_scale=1e9",
    "--set", "optimizer.overflow_tolerance=0", "--set", "optimizer.grad_accum_steps=2",
    "--set", "optimizer.steps_per_increase=3", "--set", "train_input.shuffle=true",
    "--set", "runconfig.save_checkpoints_steps=100", "--checkpoint_path", "tf_model.ckpt",
)  # fmt: skip


@pytest.fixture
def run_py(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call `run.py` in this process."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = main([str(a) for a in arguments], command=reference.run, name="run.py")
        finally:
            signal.signal(signal.SIGTERM, before)
        return Outcome(code, *capfd.readouterr())

    return call


def _rows(model_dir: str) -> list[dict]:
    lines = (Path(model_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def _tensors(prefix: str) -> dict[str, np.ndarray]:
    source = BundleSource(Path(prefix))
    return {name: read_tensor(source, name) for name in source.tensors}


@adamw
def test_the_references_command_line(golden_run: Path, run_py):
    recorded = json.loads((golden_run / "reference.json").read_text())["train_loss_logged"]
    begin = ("--checkpoint_path", "ckpt/model.ckpt-20", "--set", "runconfig.save_summary_steps=2")
    done = run_py(*TRAIN, "md", "--max_steps", 2, *begin)
    assert done.code == 0, done.stderr
    assert [row["step"] for row in _rows("md")] == [1, 2]  # weights alone: not from step 20 on
    scaled = ("--set", "optimizer.loss_scaling_factor=1000")
    begin = ("--checkpoint_path", "tf_model.ckpt", *scaled)
    assert run_py(*TRAIN, "scaled", "--steps", 3, *begin).code == 0
    assert run_py(*TRAIN, "scaled", "--steps", 2, *scaled).code == 0
    losses = [row["loss"] for row in _rows("scaled")]
    assert losses == pytest.approx([recorded[str(n)] for n in range(5)], rel=TRAINING)
    saved = load_params(Path("scaled/params.yaml"))
    assert saved.optimizer.loss_scaling_factor == 1000
    evaluated = run_py("-m", "eval", "-p", "params.yaml", "-o", "scaled", "--eval_steps", 2)
    assert "eval/lm_perplexity = " in evaluated.stdout


@adamw
def test_rehearsals_read_everything_and_train_nothing(golden_run: Path, run_py):
    done = run_py(*TRAIN, "md", "--validate_only", "--json")
    assert done.json["parameters"] == 214_976
    assert done.json["flops_per_batch"] > 6 * 128 * 150_000
    done = run_py(*TRAIN, "md", "--compile_only", "--json")
    assert done.json["instructions"] > 500
    assert not Path("md").exists()
    Path("records/data.tfrecord").write_bytes(b"")
    assert run_py(*TRAIN, "md", "--validate_only", "--compile_only").code == 2
    assert run_py("-m", "eval_all", "-p", "params.yaml", "--validate_only").code == 2


@adamw
def test_refusals(golden_run: Path, run_py):
    assert run_py("--mode", "train").code == 2
    done = run_py(*TRAIN, "md", "--cs_ip", "10.0.0.1")
    assert done.code == 1
    assert "cszoo is not on PATH" in done.stderr


def test_it_runs_as_a_file_and_as_a_module():
    for command in ([reference.__file__], ["-m", "runner.run"]):
        done = subprocess.run([sys.executable, *command, "-h"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--checkpoint_path" in done.stdout


@adamw
def test_half_precision_with_overflows_resumes_as_if_it_had_not_stopped(golden_run: Path, run_py):
    done = run_py(*TRAIN, "whole", "--max_steps", 7, *HALF)
    assert done.code == 0, done.stderr
    assert "gradients overflowed after step 0" in done.stderr
    rows = _rows("whole")
    assert rows[0]["skipped_steps"] > 0
    recorded = json.loads((golden_run / "reference.json").read_text())["train_loss_logged"]
    assert 0.9 < rows[0]["loss"] / recorded["0"] < 1.1
    # Stopped twice, once while steps since the last change are counted.
    for steps in (1, 4, 7):
        assert run_py(*TRAIN, "parts", "--max_steps", steps, *HALF).code == 0
    assert _rows("parts") == rows
    found, expected = _tensors("parts/model.ckpt-7"), _tensors("whole/model.ckpt-7")
    assert {"current_loss_scale", "good_steps", "steps_since_rescale", "skipped_steps"} <= set(
        found
    )
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


@adamw
def test_a_loss_scale_that_cannot_fall_further_stops_the_run(golden_run: Path, run_py):
    lowest = ("--set", "optimizer.min_loss_scale=1e8", "--set", "optimizer.grad_accum_steps=1")
    done = run_py(*TRAIN, "md", "--max_steps", 3, *HALF, *lowest)
    assert done.code == 1
    assert "although the loss scale has fallen to 1e+08" in done.stderr
    assert not list(Path("md").glob("model.ckpt*"))


@adamw
def test_bfloat16_and_recomputed_blocks(golden_run: Path, run_py):
    recorded = json.loads((golden_run / "reference.json").read_text())["train_loss_logged"]
    options = ("--set", "model.mixed_precision=true", "--set", "model.recompute=true",
               "--set", "model.mixed_precision_dtype=bfloat16")  # fmt: skip
    begin = ("--checkpoint_path", "tf_model.ckpt", "--max_steps", 3)
    assert run_py(*TRAIN, "md", *begin, *options).code == 0
    losses = [row["loss"] for row in _rows("md")]
    assert losses == pytest.approx([recorded[str(n)] for n in range(3)], rel=2e-3)
    assert {t.dtype for n, t in _tensors("md/model.ckpt-3").items() if "/" in n} == {np.dtype("f4")}


@adamw
def test_a_run_starts_from_random_weights(golden_run: Path, gptj):
    settings = ("--params", "params.yaml", "--max-steps", 2, "--set", "optimizer.log_hists=true")
    done = gptj("train", *settings)
    assert done.code == 0
    assert "weights are initialized at random" in done.stderr
    first = _rows("model_dir")[0]["loss"]
    assert 0.9 * np.log(512) < first < 1.5 * np.log(512)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("model_dir")
    events.Reload()
    assert "transformer.wte.weight" in events.Tags()["tensors"]


def test_initial_weights_follow_the_initializers():
    path = Path(reference.__file__).parent / "configs/params_gptj_tiny.yaml"
    values = load_params(path).model_dump(exclude_none=True)
    params = validate(values, {"model.hidden_size": 256, "model.num_hidden_layers": 3}, where="x")
    model = GPTJ(GPTJConfig(**_fields(params.config)))
    initialize(variables(model), model.config, params)
    found = variables(model)
    expected = {"wte": 50400**-0.5 * 0.8796, "q_proj": 256**-0.5, "fc_in": 256**-0.5,
                "out_proj": (4 / 9 / 256) ** 0.5, "fc_out": (4 / 9 / 256) ** 0.5,
                "lm_head": 256**-0.5}  # fmt: skip
    for tensor in table(model.config):
        values = np.asarray(found[tensor.hf])
        if values.ndim == 1:
            assert set(values) == ({1.0} if tensor.tf.endswith("gamma") else {0.0})
            continue
        key = next((k for k in expected if k in tensor.hf), None)
        if key:
            assert values.std() == pytest.approx(expected[key], rel=0.02), tensor.hf
    before = np.asarray(found["transformer.wte.weight"])
    tf.random.normal((3,), seed=1)
    initialize(variables(model), model.config, params)
    assert np.array_equal(before, np.asarray(found["transformer.wte.weight"]))


def _fields(config: GPTJConfig) -> dict:
    return {n: getattr(config, n) for n in config.__dataclass_fields__}
