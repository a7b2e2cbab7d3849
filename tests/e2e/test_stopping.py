"""Real processes, really stopped: nothing is lost, and the same command resumes.

What resumes, and what is compared with, runs in this process, which has started already.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.source import read_tensor
from tests.cli.test_train import MEASURED
from tests.conftest import make_checkpoint
from tests.e2e.running import ended, start, wait_for_step

TRAIN = (
    "train", "--init-from", "hf", "--params", "params.yaml", "--max-steps", "16",
    "--set", "runconfig.save_checkpoints_steps=3", "--set", "train_input.shuffle=true",
)  # fmt: skip
GO_ON = ("train", "--max-steps", "16")

pytestmark = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)


def _stop_after(step: int, number: signal.Signals, *arguments: str) -> tuple[int, str]:
    """Start a process, send it a signal once it has printed a step, and wait for its end."""
    with start(*arguments) as process:
        seen = wait_for_step(process, step)
        process.send_signal(number)
        seen += ended(process)
    return process.returncode, seen


def _rows(model_dir: str) -> list[dict]:
    lines = (Path(model_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def _weights(model_dir: str) -> dict[str, bytes]:
    source = BundleSource(Path(model_dir) / "model.ckpt-16")
    return {name: read_tensor(source, name).tobytes() for name in source.tensors}


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.full)])
def test_killed_at_some_steps_the_run_ends_as_if_it_had_not_been(
    golden_run: Path, kills: int, gptj
):
    assert gptj(*TRAIN, "--model-dir", "whole").code == 0
    random = np.random.default_rng()
    command = TRAIN
    for step in sorted(random.choice(np.arange(1, 16), kills, replace=False)):
        code, _ = _stop_after(int(step), signal.SIGKILL, *command)
        assert code == -signal.SIGKILL
        command = GO_ON if Path("model_dir/checkpoint").exists() else TRAIN
    assert gptj(*command).code == 0
    assert _rows("model_dir") == _rows("whole")
    assert _weights("model_dir") == _weights("whole")
    assert not list(Path("model_dir").glob(".partial-*"))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.full),
    ],
)
def test_asked_to_stop_it_saves_the_step(golden_run: Path, number: signal.Signals, code: int, gptj):
    found, text = _stop_after(5, number, *TRAIN)
    assert found == code
    assert "stopped; step" in text
    assert "Traceback" not in text
    stopped_at = len(_rows("model_dir"))
    assert Path(f"model_dir/model.ckpt-{stopped_at}.index").exists()
    assert gptj(*GO_ON).code == 0
    assert [row["step"] for row in _rows("model_dir")] == list(range(1, 17))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_conversion_stopped_midway_leaves_nothing_under_its_name(
    golden_run: Path, number: signal.Signals, code: int
):
    make_checkpoint(Path("large"), n_embd=1024, n_head=8, n_layer=8, vocab_size=5000)
    arguments = ["convert", "large", "--to", "tf", "--out", "out"]
    with start(*arguments) as process:
        assert process.stderr
        assert "tensors" in process.stderr.readline()
        process.send_signal(number)
        text = ended(process)
    # Python that is interrupted while it runs a string, as dataclasses do when they are imported,
    # ends by the signal after all; a shell shows the same code.
    assert process.returncode in (code, -number), text
    assert "error: " in text
    assert "Traceback" not in text
    assert not Path("out").exists()
    # Work done by then is kept, and the hint names --resume.
    assert ("--resume" in text) is bool(list(Path.cwd().glob("out*")))
