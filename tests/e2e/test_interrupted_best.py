"""A run killed, and refused by the system, while the best checkpoint is exchanged."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.training.run import checkpoints
from tests.conftest import Outcome
from tests.e2e.test_interrupted_save import Call, _calls, _go_on, _traced, pytestmark

__all__ = ["pytestmark"]

PROGRAM = [
    *("train", "--init-from", "hf", "--params", "params.yaml"),
    *("--mode", "train_and_eval", "--max-steps", "5", "--set", "optimizer.learning_rate=0.3"),
    *("--set", "runconfig.save_checkpoints_steps=1", "--set", "runconfig.keep_checkpoint_max=1"),
    *("--set", "runconfig.keep_best=1"),
]


def _found() -> dict[str, object]:
    """Checkpoints, evaluations and choice of the run."""
    rows = [json.loads(line) for line in Path("model_dir/metrics.jsonl").read_text().splitlines()]
    return {
        "steps": checkpoints.steps(Path("model_dir")),
        "evaluations": [row for row in rows if "eval/loss" in row],
        "losses": [(row["step"], row["loss"]) for row in rows if "loss" in row],
        "best": json.loads(Path("model_dir/best.json").read_text()),
    }


def _assert_nothing_lost(where: str) -> None:
    """What best.json names is there and whole, and so is the newest."""
    best = Path("model_dir/best.json")
    if best.is_file():
        for entry in json.loads(best.read_text())["checkpoints"]:
            assert Path("model_dir", entry["checkpoint"] + ".index").is_file(), where
    if checkpoints.steps(Path("model_dir")):
        _, source = checkpoints.open_newest(Path("model_dir"), strict=True, warn=pytest.fail)
        source.close()


def _interrupt(
    gptj: Callable[..., Outcome], faults: list[str], choose: Callable[[list[Call]], list[Call]]
) -> None:
    assert _traced(PROGRAM).returncode == 0
    whole = _found()
    exchanging = _exchanging()
    assert {call.kind for call in exchanging} >= {"rename", "unlink"}
    for call in choose(exchanging):
        for fault in faults:
            shutil.rmtree("model_dir")
            done = _traced(PROGRAM, f"{call.kind}:{fault}:when={call.number}")
            where = f"{call.text} {fault}: {done.stderr}"
            assert done.returncode != 0, where
            assert "Traceback" not in done.stderr, where
            _assert_nothing_lost(where)
            _go_on(PROGRAM, gptj)
            assert _found() == whole, where


def _exchanging() -> list[Call]:
    """The calls that write best.json, and those that delete checkpoints."""
    return [c for c in _calls() if "best.json" in c.text or c.kind == "unlink"]


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_killed_at_some_call(golden_run: Path, gptj):
    _interrupt(gptj, ["signal=KILL"], lambda calls: [random.choice(calls)])


@pytest.mark.full
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC"])
def test_killed_and_refused_at_every_call(golden_run: Path, fault: str, gptj):
    _interrupt(gptj, [fault], lambda calls: calls)
