"""A run's checkpoint being saved, killed and refused by the system at single calls.

See `test_interrupted_conversion` for how strace does it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.source import read_tensor
from runner.training.run import checkpoints
from runner.training.run.folder import locked
from tests.cli.test_train import MEASURED
from tests.conftest import Outcome
from tests.e2e.tracing import needs_strace, traced

pytestmark = needs_strace

CHANGING = "write,pwrite64,fallocate,ftruncate,fsync,rename,unlink,unlinkat"
#: The saving alone, without the seconds that TensorFlow takes to start.
SAVE = """
import numpy as np
from pathlib import Path
from runner.training.run import checkpoints
step, keep = map(int, sys.argv[1:])
tensors = {f"w{n}": np.full((40, 50), step + n, np.float32) for n in range(3)}
checkpoints.save(Path("model_dir"), step, tensors, keep=keep)
"""
TRAIN = (
    *("train", "--init-from", "hf", "--params", "params.yaml", "--max-steps", "4"),
    *("--set", "runconfig.save_checkpoints_steps=2", "--set", "runconfig.keep_checkpoint_max=1"),
    *("--set", "train_input.shuffle=true", "--set", "model.residual_dropout_rate=0.1"),
)


#: What takes seconds precedes the calls that are traced: loading TensorFlow, and compiling the step
#: in a run that leaves its programs to the traced one.
STARTED = """
import shutil
from runner.cli.shared import framework
from runner.evaluation.reuse import reuse_programs
framework.prepare()
kept = reuse_programs(2)
kept.__enter__()
assert runner.cli.root.main([*sys.argv[1:], "--quiet", "--model-dir", "other"]) == 0
shutil.rmtree("other")
"""


def _traced(arguments: Sequence[str], inject: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program, traced."""
    return traced(*arguments, calls=CHANGING, inject=inject, before=STARTED)


class Call(NamedTuple):
    """A system call."""

    thread: str
    kind: str
    number: int
    """Number among the calls of its kind and thread: strace counts per thread."""
    text: str


def _trace() -> list[Call]:
    """Yield each call on the run's folder."""
    seen: dict[tuple[str, str], int] = {}
    found = []
    for line in Path("trace").read_text().splitlines():
        if call := re.match(r"(\d+) +(\w+)\(", line):
            thread, kind = call.groups()
            seen[thread, kind] = seen.get((thread, kind), 0) + 1
            if "model_dir" in line:
                found.append(Call(thread, kind, seen[thread, kind], line))
    return found


def _calls() -> list[Call]:
    """Return one call of each kind and number."""
    return list({(call.kind, call.number): call for call in _trace()}.values())


def _overlapped() -> list[Call]:
    """Return the calls that write a state after a pass of the next step has saved its outputs."""
    found, passing = [], False
    calls = _trace()
    for call in calls:
        if "scratch" in call.text:
            passing = call.thread == calls[0].thread
        elif passing and call.kind == "pwrite64" and "data-" in call.text:
            found.append(call)
    return found


def _save(step: int, keep: int, inject: str = "") -> subprocess.CompletedProcess[str]:
    return traced(str(step), str(keep), calls=CHANGING, inject=inject, run=SAVE)


def _content() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path("model_dir").iterdir() if p.name != ".lock"}


def _newest() -> int:
    """Return the step of the newest checkpoint, which must be complete and what was saved."""
    step, source = checkpoints.open_newest(Path("model_dir"), strict=True, warn=pytest.fail)
    for n in range(3):
        assert np.all(read_tensor(source, f"w{n}") == step + n)
    source.close()
    return step


def _saved(keep: int) -> tuple[list[Call], dict[str, bytes]]:
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
    assert {call.kind for call in calls} == {"write", "pwrite64", "fallocate", "fsync", "rename",
                                             "unlink"}  # fmt: skip
    for _, kind, n, _ in calls[:: max(1, len(calls) // count)]:
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
    _interrupt(1, ["signal=KILL", "error=ENOSPC"], 4)


@pytest.mark.full
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_every_call(keep: int, workdir: Path):
    _interrupt(keep, ["signal=KILL"], 10**9)


@pytest.mark.full
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
def test_refused_at_every_call(error: str, workdir: Path):
    _interrupt(1, [f"error={error}"], 10**9)


def _state() -> tuple[list[dict], dict[str, bytes]]:
    """Return the results of a run: its metrics and its last checkpoint."""
    rows = [json.loads(line) for line in Path("model_dir/metrics.jsonl").read_text().splitlines()]
    source = BundleSource(Path("model_dir/model.ckpt-4"))
    tensors = {name: read_tensor(source, name).tobytes() for name in source.tensors}
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows], tensors


def _spread(calls: list[Call], count: int) -> list[Call]:
    """Return `count` of the calls, evenly spread over the list."""
    assert calls
    return calls[len(calls) // (count + 1) :: max(1, len(calls) // (count + 1))][:count]


def _logged() -> int:
    """Return the number of logged steps."""
    path = Path("model_dir/metrics.jsonl")
    return len(path.read_text().splitlines()) if path.exists() else 0


def _newest_step() -> int:
    return max(checkpoints.steps(Path("model_dir")), default=0)


def _whole_run(program: Sequence[str]) -> tuple[object, set[str]]:
    """What the run computes, and its files but for TensorBoard's; ./trace is of it."""
    assert _traced(program).returncode == 0
    return _found()


def _found() -> tuple[object, set[str]]:
    return _state(), {name for name in _content() if "tfevents" not in name}


def _go_on(program: Sequence[str], gptj: Callable[..., Outcome]) -> None:
    """Run the program of `_traced` in this process, which has started already."""
    again = gptj(*program)
    assert again.code == 0, again.stderr


def _kill_and_go_on(
    gptj: Callable[..., Outcome], program: Sequence[str], count: int, lost: int
) -> None:
    """A run killed at some of its calls, each time from the beginning, ends as if it had not been.

    Args:
        gptj: the program in this process.
        program: of the run.
        count: of calls.
        lost: steps that a kill may undo, at most.
    """
    whole = _whole_run(program)
    for _, kind, n, _ in _spread(_calls(), count):
        shutil.rmtree("model_dir")
        done = _traced(program, f"{kind}:signal=KILL:when={n}")
        assert _logged() - _newest_step() <= lost, f"{kind} {n}: {done.stderr}"
        _go_on(program, gptj)
        assert _found() == whole, f"{kind} {n}"


@pytest.mark.full
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(golden_run: Path, gptj):
    _kill_and_go_on(gptj, TRAIN, 40, lost=2)


STREAMED = (*TRAIN, "--execution", "streaming")


@pytest.mark.full
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_streamed_run_that_is_killed_loses_a_step_at_most(golden_run: Path, gptj):
    _kill_and_go_on(gptj, STREAMED, 30, lost=1)


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_streamed_run_that_is_refused_and_killed_during_an_update_behind_the_next_step(
    golden_run: Path,
    gptj,
):
    whole = _whole_run(STREAMED)
    refused, killed = _spread(_overlapped(), 2)
    shutil.rmtree("model_dir")
    done = _traced(STREAMED, f"pwrite64:error=ENOSPC:when={refused.number}")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert re.search("model.ckpt.*cannot be written: No space", done.stderr), done.stderr
    assert _logged() - _newest_step() <= 1
    done = _traced(STREAMED, f"pwrite64:signal=KILL:when={killed.number}")
    assert done.returncode < 0
    assert _logged() - _newest_step() <= 1
    _go_on(STREAMED, gptj)
    assert _found() == whole
