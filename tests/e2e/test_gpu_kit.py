"""The kit for a GPU machine, tried on a processor with tiny models."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpu.kit import LIMIT, PACKAGES, versions
from tests.conftest import any_backend

ROOT = Path(__file__).parents[2]
TINY = ("--preset", "tiny", "--set", "vocab_size=64", "--set", "n_layer=1", "--batch", 2,
        "--length", 16, "--steps", 2, "--new", 3)  # fmt: skip


def _measured(side: str, *options: object) -> dict[str, Any]:
    command = [sys.executable, ROOT / "benchmarks/accelerator.py", side, *TINY, *options]
    done = subprocess.run(
        [str(word) for word in command],
        env=any_backend(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def _stages(out: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "gpu/stages.py", "--tiny", "--out", out, *options]
    words = [str(word) for word in command]
    return subprocess.Popen(
        words, env=any_backend(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("side", "more"),
    [
        ("train", ()),
        pytest.param("train", ("--lora",), marks=pytest.mark.full),
        pytest.param("generate", (), marks=pytest.mark.full),
        pytest.param("train-peer", (), marks=pytest.mark.full),
        pytest.param("generate-peer", (), marks=pytest.mark.full),
    ],
)
def test_each_side_is_measured(side: str, more: tuple[str, ...]):
    found = _measured(side, *more)
    assert found["tokens_per_second"] > 0
    assert found["device"] == "cpu"
    assert "mfu" not in found  # no card, no rate to compare with
    if side == "train":
        assert len(found["losses"]) == 3
        # Random ids of 64: about ln 64.
        assert found["losses"][0] == pytest.approx(4.16, abs=0.1)
    if side.startswith("generate"):
        assert (found["prompt"], found["new"]) == (16, 3)


@pytest.mark.full
def test_a_stage_that_fails_is_a_row(tmp_path: Path):
    """One that runs, and one that needs a GPU."""
    names = ("golden run", "train flash")
    stages = _stages(tmp_path, "--only", *names, "--seconds", 60)
    out, _ = stages.communicate()
    assert stages.returncode == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(names)
    assert results["golden run"]["ok"] is True
    assert results["golden run"]["relative"] < 1e-5
    assert (
        "model.flash_attention is true, and JAX computes with cpu"
        in (results["train flash"]["error"])
    )
    table = (tmp_path / "table.md").read_text()
    assert "| training against a recorded run | ok: losses of 20 steps within" in table
    assert "| training, flash attention | failed: exit code 1: " in table
    assert "| training, plain attention | not run | not run |  |  |" in table
    assert out.endswith(table[table.index("|  |") :] + "\n")


def test_a_stage_has_a_limit(tmp_path: Path):
    stages = _stages(tmp_path, "--only", "golden run", "generate", "--seconds", 1.5)
    stages.communicate()
    results = json.loads((tmp_path / "results.json").read_text())
    errors = [results[name].get("error") for name in ("golden run", "generate")]
    assert errors == ["exceeded its time limit", "no time is left"]


def test_a_signal_ends_what_a_stage_runs(tmp_path: Path):
    stages = _stages(tmp_path, "--only", "train plain")
    children = Path(f"/proc/{stages.pid}/task/{stages.pid}/children")
    while not (found := children.read_text().split()):
        time.sleep(0.01)
    stages.send_signal(signal.SIGTERM)
    assert stages.wait() == 143
    stages.communicate()
    assert not any(Path("/proc", child).exists() for child in found)


def test_the_lock_has_the_packages_of_the_kit():
    assert set(PACKAGES) <= versions().keys()


@pytest.mark.full
def test_the_kit_is_small(tmp_path: Path):
    """And whole: sources and one wheel for each package that the machine lacks."""
    kit = tmp_path / "kit"
    done = subprocess.run(
        [sys.executable, ROOT / "gpu/kit.py", kit], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in kit.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    wheels = [path.name for path in (kit / "wheels").iterdir()]
    names = {name.replace("-", "_").replace(".", "_") for name in PACKAGES}
    assert {wheel.split("-")[0] for wheel in wheels} == names
    assert all("cp312" in w or "py3-none-any" in w for w in wheels)
    for name in ("gpu/run.sh", "benchmarks/accelerator.py", "runner/cli/root.py",
                 "tests/golden_runs/adamw/reference.json"):  # fmt: skip
        assert (kit / name).is_file()
