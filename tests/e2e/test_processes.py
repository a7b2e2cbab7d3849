"""Several processes of JAX that compute together: one run's numbers, and the death of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.source import read_tensor
from tests.conftest import GOLDEN_RUNS
from tests.e2e.running import ended, start, wait_for_step

BEGIN = ("train", "--init-from", "hf", "--params", "params.yaml", "--backend", "jax")
EVALUATED = ("--mode", "train_and_eval", "--set", "runconfig.save_checkpoints_steps=4")
#: Largest relative difference of a loss: sums in float32 in another order.
ROUNDING = 2e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The recorded case, as current folder."""
    path = tmp_path_factory.mktemp("processes") / "adamw"
    shutil.copytree(GOLDEN_RUNS / "adamw", path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.delenv("KERAS_BACKEND", raising=False)
        yield path


def _run(*arguments: object, code: int = 0) -> tuple[str, str]:
    process = start(*BEGIN, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def _rows(folder: str) -> list[dict]:
    path = Path(folder, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict]:
    """Rows of a run of one process, with an evaluation after every four steps."""
    one = ("--set", "runconfig.mesh=[1,1]", "--model-dir", "alone", "--quiet")
    _run(*one, *EVALUATED, "--max-steps", 12)
    return _rows("alone")


def _assert_same(found: str, expected: list[dict], step: int) -> None:
    rows = [[r for r in rows if r["step"] <= step] for rows in (_rows(found), expected)]
    for row, other in zip(*rows, strict=True):
        for key in ("loss", "eval/loss"):
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=ROUNDING), (
                row["step"],
                key,
            )
    ours, theirs = (BundleSource(Path(f, f"model.ckpt-{step}")) for f in (found, "alone"))
    assert ours.tensors == theirs.tensors
    for name in theirs.tensors:
        a, b = read_tensor(ours, name), read_tensor(theirs, name)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6, err_msg=name)


@pytest.mark.full
def test_four_processes_with_sharded_weights_are_one(alone: list[dict]):
    shard = ("--set", "runconfig.mesh=[2,2]", "--set", "runconfig.shard_weights=true")
    _run("--workers", 4, *shard, *EVALUATED, "--max-steps", 12, "--model-dir", "four", "--quiet")
    _assert_same("four", alone, 12)


def test_two_processes_are_one_also_after_one_is_killed(alone: list[dict]):
    """Each evaluates its rows, and only the first writes and prints."""
    more = ("--workers", 2, *EVALUATED, "--model-dir", "two")
    with start(*BEGIN, *more, "--max-steps", 10**6) as process:
        wait_for_step(process, 5)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        err = ended(process)
    assert process.returncode == 1
    assert err.count("error: ") == 1
    assert "error: another worker is gone" in err
    assert "hint: start all of them again" in err
    assert "Traceback" not in err
    saved = max(int(p.stem.split("-")[1]) for p in Path("two").glob("model.ckpt-*.index"))
    assert saved < 12, "killed too late to compare"
    out, err = _run(*more, "--max-steps", 12, "--json")
    assert json.loads(out)["step"] == 12
    assert err.count("step     12/12") == 1
    _assert_same("two", alone, 12)


def test_what_processes_cannot_do(folder: Path):
    _, err = _run("--workers", 2, "--set", "runconfig.mesh=[1,1]", "--model-dir", "bad", code=2)
    assert "runconfig.mesh is 1 × 1, 1 devices, and the 2 processes have 2" in err
    assert not Path("bad").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cuda")
        _, err = _run("--model-dir", "bad", code=2)
    assert "error: JAX has no device to compute on (JAX_PLATFORMS is 'cuda')" in err
    assert not Path("bad").exists()
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{free.getsockname()[1]}" for free in (one, other)]
    processes = []
    for index in range(2):
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
        processes.append(
            start(*BEGIN, "--set", f"model.dropout_seed={index}", "--model-dir", "bad")
        )
    del os.environ["TF_CONFIG"]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "error: worker 1 has other parameters than the first worker" in errors[1]
    assert "error: worker 0 is not alone: others differ from the first worker" in errors[0]
    assert not Path("bad").exists()
