"""Several workers on this machine: one run's numbers, its signals, and the death of one of them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from gptj_model.errors import ConfigError, TrainingFault
from runner.config.params_file import load_params
from runner.training.devices.distribution import TF_CONFIG, Alone, Cluster, cluster_here, join
from runner.training.run import checkpoints
from runner.training.train import Run
from tests.cli.test_train import BEGIN, _tensors
from tests.e2e.running import ended, start, wait_for_step

adamw = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)


def _rows(folder: str) -> list[dict]:
    path = Path(folder, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _assert_same(found: str, expected: str, step: int) -> None:
    """Return losses and norms up to a step, and the weights after it."""
    for row, other in zip(_rows(found)[:step], _rows(expected)[:step], strict=True):
        for key in ("step", "loss", "learning_rate", "unclipped_grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-5), (row["step"], key)
    ours, theirs = (_tensors(f"{d}/model.ckpt-{step}") for d in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=3e-6, err_msg=name)


@adamw
def test_two_workers_are_one_also_after_a_kill_and_a_signal(golden_run: Path, gptj):
    more = ("--set", "optimizer.grad_accum_steps=2", "--set", "runconfig.save_checkpoints_steps=2")
    begin = (*BEGIN, "--workers", 2, *more, "--max-steps", 10**6)
    with start(*begin) as process:
        wait_for_step(process, 3)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        err = ended(process)
    assert process.returncode == 1
    assert "error: another worker is gone" in err
    assert "hint: start all of them again" in err
    assert "Traceback" not in err
    reached = _rows("model_dir")[-1]["step"]
    with start(*begin) as process:
        err = wait_for_step(process, reached + 1)
        process.send_signal(signal.SIGTERM)
        err += ended(process)
    assert process.returncode == 143, err
    last = checkpoints.steps(Path("model_dir"))[-1]
    assert f"stopped; step {last} is saved" in err
    assert last > reached
    assert err.count(f"step {last:6}/") == 1
    assert gptj(*BEGIN, *more, "--max-steps", last, "--model-dir", "alone", "--quiet").code == 0
    _assert_same("model_dir", "alone", last)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"cluster": {"worker": ["a:1", "b:1"]}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
        '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_an_invalid_cluster(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(TF_CONFIG, text)
    with pytest.raises(ConfigError, match="TF_CONFIG is"):
        cluster_here()


def test_the_chief_is_the_first_worker(monkeypatch: pytest.MonkeyPatch):
    cluster = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}
    for kind, index, at in (("chief", 0, 0), ("worker", 1, 2)):
        task = {"type": kind, "index": index}
        monkeypatch.setenv(TF_CONFIG, json.dumps({"cluster": cluster, "task": task}))
        assert cluster_here() == Cluster(("a:1", "b:1", "c:1"), at)


@adamw
def test_several_machines_without_their_names(golden_run: Path, gptj, monkeypatch):
    monkeypatch.delenv(TF_CONFIG, raising=False)
    several = ("runconfig.enable_distributed=true", "runconfig.multiple_workers=true")
    done = gptj(*BEGIN, *(word for value in several for word in ("--set", value)))
    assert done.code == 2
    assert "TF_CONFIG does not say who they are" in done.stderr
    one = {"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv(TF_CONFIG, json.dumps(one))
    assert isinstance(join(cluster_here(), print), Alone)


class _Second(Alone):
    """One of two workers, the first of which is at the next step."""

    index, count = 1, 2

    def total(self, values):
        return np.add(values, 1)


@adamw
def test_workers_that_start_at_different_steps(golden_run: Path):
    from runner.training.train import train

    params = load_params(Path("params.yaml"), {})
    run = Run(params, Path("model_dir"), init_from=Path("hf"), workers=_Second())
    with pytest.raises(TrainingFault, match="not all have the same step and weights"):
        list(train(run, 1, stopped=lambda: False))
    assert not Path("model_dir").exists()
    streaming = load_params(Path("params.yaml"), {"runconfig.execution": "streaming"})
    with pytest.raises(ConfigError, match="there are 2 workers, expected 1"):
        Run(streaming, Path("model_dir"), init_from=Path("hf"), workers=_Second())


@adamw
def test_another_number_of_workers_must_be_requested(golden_run: Path, gptj):
    more = ("--model-dir", "model_dir", "--quiet")
    assert gptj(*BEGIN, *more, "--max-steps", 2).code == 0
    result = gptj(*BEGIN, *more, "--max-steps", 4, "--workers", 2)
    assert result.code == 2
    assert "runconfig.workers was 1, now 2" in result.stderr
    assert _rows("model_dir")[-1]["step"] == 2
    text = Path("model_dir/params.yaml").read_text()
    Path("model_dir/params.yaml").write_text(text.replace("workers: 1", "workers: 2"))
    assert gptj(*BEGIN, *more, "--max-steps", 4).code == 2
    accepted = gptj(*BEGIN, *more, "--max-steps", 4, "--set", "runconfig.workers=1")
    assert accepted.code == 0, accepted.stderr
