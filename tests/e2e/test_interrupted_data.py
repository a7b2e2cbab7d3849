"""Records being made, killed and refused by the system at single calls: nothing is lost.

See `test_interrupted_conversion` for how strace does it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import chdir
from functools import partial
from pathlib import Path

import pytest

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from runner.data.making import encoding
from tests.conftest import Outcome
from tests.e2e.tracing import needs_strace, started, traced

pytestmark = needs_strace

CHANGING = ("write", "fsync", "rename", "unlink", "mkdir")
#: Chunks far smaller than a record file, as in a large set.
CHUNK_BYTES = 300
SMALL_CHUNKS = (
    f"from runner.data.making import build, encoding, text; encoding.CHUNK_BYTES = {CHUNK_BYTES}"
)
PILE = (
    *("data", "pile", "a.jsonl", "--tokenizer", "tokenizer", "--max-sequence-length", "16"),
    *("--files-per-record", "20", "--quiet"),
)
ALONE = ("--processes", "1")


def _traced(inject: str = "", *options: str) -> subprocess.CompletedProcess[str]:
    command, calls = (*PILE, *ALONE, *options), ",".join(CHANGING)
    return traced(*command, calls=calls, inject=inject, before=SMALL_CHUNKS)


@pytest.fixture
def run(gptj, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Make the records in this process, which has started already."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", CHUNK_BYTES)
    return partial(gptj, *PILE)


def _calls() -> list[tuple[str, int]]:
    """Kind and number within the kind of each call on the output."""
    seen = dict.fromkeys(CHANGING, 0)
    found = []
    for line in Path("trace").read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if call and call[1] in seen:
            seen[call[1]] += 1
            if "partial-gptj" in line:
                found.append((call[1], seen[call[1]]))
    return found


def _content() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path("data").iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ./a.jsonl, the trace of an uninterrupted run, and its result at ./data."""
    folder = tmp_path_factory.mktemp("unbroken")
    with chdir(folder):
        Path("tokenizer").mkdir()
        write_tokenizer(Path("tokenizer"))
        lines = [json.dumps({"text": f"document {n} " * (n % 30 + 1)}) for n in range(200)]
        Path("a.jsonl").write_text("\n".join(lines))
        assert _traced().returncode == 0
    return folder


@pytest.fixture
def whole(workdir: Path, unbroken: Path) -> dict[str, bytes]:
    """The result of an uninterrupted run, and its source ./a.jsonl."""
    shutil.copytree(unbroken, workdir, dirs_exist_ok=True)
    found = _content()
    assert len(found) > 8
    shutil.rmtree("data")
    return found


def _kill_everywhere(run, whole: dict[str, bytes], count: int) -> None:
    calls = _calls()
    assert {kind for kind, _ in calls} >= {"write", "fsync", "rename"}
    step = max(1, len(calls) // count) if count else 1
    # Before the first of them there is nothing to resume.
    for kind, n in calls[1 + random.randrange(step) :: step]:
        shutil.rmtree("data", ignore_errors=True)
        shutil.rmtree("data.partial-gptj", ignore_errors=True)
        _traced(f"{kind}:signal=KILL:when={n}")
        if Path("data").exists():
            assert _content() == whole
        resumed = run("--resume", *ALONE)
        assert resumed.code == 0, f"{kind} {n}: {resumed.stderr}"
        assert _content() == whole, f"{kind} {n}"
        assert not Path("data.partial-gptj").exists()


def test_killed_at_some_calls(whole: dict[str, bytes], run):
    _kill_everywhere(run, whole, 3)


@pytest.mark.full
def test_killed_at_every_call(whole: dict[str, bytes], run):
    _kill_everywhere(run, whole, 0)


@pytest.mark.parametrize("error", ["ENOSPC", pytest.param("EIO", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["write", "fsync", "rename"])
def test_a_call_that_fails(error: str, kind: str, whole: dict[str, bytes], run):
    last = [n for k, n in _calls() if k == kind][-4]
    done = _traced(f"{kind}:error={error}:when={last}")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "with --resume to reuse what is done" in done.stderr
    assert not Path("data").exists()
    assert run(*ALONE).code == 2
    assert run("--resume", *ALONE).code == 0
    assert _content() == whole


def test_what_was_done_is_not_done_again_and_another_job_is_refused(whole: dict[str, bytes], run):
    renames = [n for k, n in _calls() if k == "rename"]
    _traced(f"rename:signal=KILL:when={renames[len(renames) // 2]}")
    other = run("--resume", "--seed", "3", *ALONE)
    assert other.code == 2
    assert "has other sources or options" in other.stderr
    damaged = Path("data.partial-gptj/content/records-00001.tfrecord")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = Path("data.partial-gptj/content/records-00000.tfrecord").stat().st_mtime_ns
    assert run("--resume", "--processes", "2").code == 0
    assert _content() == whole
    assert Path("data/records-00000.tfrecord").stat().st_mtime_ns == before


def test_a_changed_source_is_noticed(whole: dict[str, bytes], run):
    renames = [n for k, n in _calls() if k == "rename"]
    _traced(f"rename:signal=KILL:when={renames[3]}")
    with Path("a.jsonl").open("a") as file:
        file.write('\n{"text": "more"}')
    done = run("--resume", *ALONE)
    assert done.code == 1
    assert "a.jsonl: has changed since" in done.stderr


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(c) for c in found if b"resource_tracker" not in Path(f"/proc/{c}/cmdline").read_bytes()
    ]


@pytest.mark.parametrize("victim", ["first", "worker"])
def test_any_process_killed(victim: str, whole: dict[str, bytes], run):
    # Every name after the first is given late, so that the kill comes before the end.
    late = "rename:delay_enter=2000000:when=3+"
    command = (*PILE, "--processes", "2")
    with started(*command, calls="rename", inject=late, before=SMALL_CHUNKS) as process:
        # The first finished file; the folder itself is created again at the start.
        while not Path("data.partial-gptj/content/records-00000.tfrecord").exists():
            assert process.poll() is None
        workers = _children(process.pid)
        assert len(workers) == 2
        os.kill(process.pid if victim == "first" else workers[0], signal.SIGKILL)
        assert process.stderr
        stderr = process.stderr.read()  # ends when the last process does
    if victim == "worker":
        assert process.returncode == 1, stderr
        assert "was killed" in stderr
        assert "with --resume to reuse what is done" in stderr
    assert not Path("data").exists()
    assert run("--resume", *ALONE).code == 0
    assert _content() == whole


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
def test_stopped_by_a_signal(name: str, code: int, whole: dict[str, bytes], run):
    renames = [n for k, n in _calls() if k == "rename"]
    done = _traced(f"rename:signal={name}:when={renames[3]}")
    assert done.returncode == code, done.stderr
    assert "run the same command with --resume" in done.stderr
    assert run("--resume", *ALONE).code == 0
    assert _content() == whole
