"""A run's checkpoint being saved, killed and refused by the system at single calls.

See `test_interrupted_conversion` for how strace does it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptj_convert.formats.bundle import BundleSource
from gptj_model.source import read_tensor
from runner import checkpoints
from runner.run_folder import locked
from tests.cli.test_train import MEASURED

pytestmark = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "strace -V"], capture_output=True).returncode != 0,
    reason="needs strace",
)

CHANGING = "write,pwrite64,fallocate,ftruncate,fsync,rename,unlink,unlinkat"
#: The saving alone, without the seconds that TensorFlow takes to start.
SAVE = """
import sys
import numpy as np
from pathlib import Path
from runner import checkpoints
step, keep = map(int, sys.argv[1:])
tensors = {f"w{n}": np.full((40, 50), step + n, np.float32) for n in range(3)}
checkpoints.save(Path("model_dir"), step, tensors, keep=keep)
"""
TRAIN = (
    *("train", "--init-from", "hf", "--params", "params.yaml", "--max-steps", "4"),
    *("--set", "runconfig.save_checkpoints_steps=2", "--set", "runconfig.keep_checkpoint_max=1"),
    *("--set", "train_input.shuffle=true", "--set", "model.residual_dropout_rate=0.1"),
)


def _traced(program: list[str], inject: str = "") -> subprocess.CompletedProcess[str]:
    strace = ["strace", "-f", "-y", "-qqq", "-o", "trace", "-e", f"trace={CHANGING}"]
    strace += ["-e", "signal=none", *(["-e", f"inject={inject}"] if inject else [])]
    command = [*strace, sys.executable, "-B", *program]
    return subprocess.run(command, capture_output=True, text=True)


def _calls() -> list[tuple[str, int]]:
    """Kind and number within the kind of each call on the run's folder."""
    seen: dict[tuple[str, str], int] = {}
    found = []
    for line in Path("trace").read_text().splitlines():
        if call := re.match(r"(\d+) +(\w+)\(", line):
            # strace counts for each thread.
            seen[call[1], call[2]] = seen.get((call[1], call[2]), 0) + 1
            if "model_dir" in line:
                found.append((call[2], seen[call[1], call[2]]))
    return list(dict.fromkeys(found))


def _save(step: int, keep: int, inject: str = "") -> subprocess.CompletedProcess[str]:
    return _traced(["-c", SAVE, str(step), str(keep)], inject)


def _content() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path("model_dir").iterdir() if p.name != ".lock"}


def _newest() -> int:
    """The newest checkpoint, which is whole and what was saved."""
    step, source = checkpoints.open_newest(Path("model_dir"), strict=True, warn=pytest.fail)
    for n in range(3):
        assert np.all(read_tensor(source, f"w{n}") == step + n)
    source.close()
    return step


def _saved(keep: int) -> tuple[list[tuple[str, int]], dict[str, bytes]]:
    """./before holds what a save of step 4 finds: its calls, and what it leaves."""
    shutil.rmtree("before", ignore_errors=True)
    Path("model_dir").mkdir()
    for step in range(4 - keep, 4):
        assert _save(step, keep).returncode == 0
    shutil.copytree("model_dir", "before")
    assert _save(4, keep).returncode == 0
    return _calls(), _content()


def _interrupt(keep: int, faults: list[str], count: int) -> None:
    calls, whole = _saved(keep)
    assert {kind for kind, _ in calls} == {"write", "pwrite64", "fallocate", "fsync", "rename",
                                           "unlink"}  # fmt: skip
    for kind, n in calls[:: max(1, len(calls) // count)]:
        for fault in faults:
            shutil.rmtree("model_dir")
            shutil.copytree("before", "model_dir")
            done = _save(4, keep, f"{kind}:{fault}:when={n}")
            where = f"{kind} {n} {fault}: {done.stderr}"
            assert _newest() in (3, 4), where
            if "error" in fault:
                assert done.returncode == 1, where
                assert re.search(r"(FileFault|OSError): .*model", done.stderr), where
            with locked(Path("model_dir")):
                pass  # as the next run does before all else
            assert _save(4, keep).returncode == 0, where
            assert _content() == whole, where


def test_killed_and_refused_at_some_calls(workdir: Path):
    _interrupt(1, ["signal=KILL", "error=ENOSPC"], 6)


@pytest.mark.full
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_every_call(keep: int, workdir: Path):
    _interrupt(keep, ["signal=KILL"], 10**9)


@pytest.mark.full
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
def test_refused_at_every_call(error: str, workdir: Path):
    _interrupt(1, [f"error={error}"], 10**9)


def _state() -> tuple[list[dict], dict[str, bytes]]:
    """What a run has computed: its metrics and its last checkpoint."""
    rows = [json.loads(line) for line in Path("model_dir/metrics.jsonl").read_text().splitlines()]
    source = BundleSource(Path("model_dir/model.ckpt-4"))
    tensors = {name: read_tensor(source, name).tobytes() for name in source.tensors}
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows], tensors


def _kill_and_go_on(program: list[str], count: int, lost: int) -> None:
    """A run killed at some of its calls, each time from the beginning, ends as if it had not been.

    Args:
        program: of the run.
        count: of calls.
        lost: steps that a kill may undo, at most.
    """
    assert _traced(program).returncode == 0  # what it compiles is there from now on
    shutil.rmtree("model_dir")
    assert _traced(program).returncode == 0
    whole, names = _state(), set(_content())
    calls = _calls()
    for kind, n in calls[len(calls) // (count + 1) :: max(1, len(calls) // (count + 1))][:count]:
        shutil.rmtree("model_dir")
        done = _traced(program, f"{kind}:signal=KILL:when={n}")
        logged = Path("model_dir/metrics.jsonl")
        steps = len(logged.read_text().splitlines()) if logged.exists() else 0
        kept = max(checkpoints.steps(Path("model_dir")), default=0)
        assert steps - kept <= lost, f"{kind} {n}"
        again = subprocess.run([sys.executable, "-B", *program], capture_output=True, text=True)
        assert again.returncode == 0, f"{kind} {n}: {done.stderr} {again.stderr}"
        assert _state() == whole, f"{kind} {n}"
        assert {x for x in _content() if "tfevents" not in x} == {
            x for x in names if "tfevents" not in x
        }, f"{kind} {n}"


@pytest.mark.full
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_run_killed_at_every_call_ends_as_if_it_had_not_been(golden_run: Path):
    _kill_and_go_on(["-m", "runner.cli.root", *TRAIN], 10**9, lost=2)


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
@pytest.mark.parametrize("count", [1, pytest.param(60, marks=pytest.mark.full)])
def test_a_streamed_run_that_is_killed_loses_a_step_at_most(golden_run: Path, count: int):
    streamed = ("--execution", "streaming")
    _kill_and_go_on(["-m", "runner.cli.root", *TRAIN, *streamed], count, lost=1)
