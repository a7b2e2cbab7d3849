"""Downloads killed at single calls, from a hub on the loopback device: the next run completes.

See `test_interrupted_conversion` for how strace does it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from tests.cli.fake_hub import REPOSITORY, FakeHub, serving
from tests.e2e.tracing import needs_strace, traced

pytestmark = needs_strace

CHANGING = ("write", "ftruncate", "fsync", "rename", "unlink", "mkdir")
MODEL = ("download", REPOSITORY, "--quiet")
DATA = (
    *("data", "pile", "--download", "--repository", REPOSITORY, "--tokenizer", "."),
    *("--processes", "1", "--force", "--quiet"),
)
FOLDER = Path(REPOSITORY.rpartition("/")[2])
WEIGHTS = bytes(range(256)) * 16 * 1024
#: Bytes that may come twice when a download was killed.
MAY_COME_TWICE = 64 * 2**20


@pytest.fixture
def hub(small_hf: Path, workdir: Path) -> Iterator[FakeHub]:
    config = (small_hf / "config.json").read_bytes()
    hub = FakeHub({"config.json": config, "vocab.json": b"{}", "model.safetensors": WEIGHTS})
    with _called(hub, workdir):
        yield hub


@pytest.fixture
def data_hub(workdir: Path) -> Iterator[FakeHub]:
    write_tokenizer(workdir)
    files = {f"train/{n}.jsonl": b'{"text": "%d"}' % n for n in (0, 1)}
    hub = FakeHub(files | {"val/x/0.txt": b"text\n" * 1000}, kind="dataset")
    with _called(hub, workdir):
        yield hub


@contextmanager
def _called(hub: FakeHub, workdir: Path) -> Iterator[None]:
    with serving(hub) as endpoint:
        home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(workdir / "home"), "HF_TOKEN": ""}
        os.environ.update(home)
        yield
        for name in home:
            del os.environ[name]


def _traced(command: tuple[str, ...], inject: str = "") -> int:
    return traced(*command, calls=",".join(CHANGING), inject=inject).returncode


def _started(command: tuple[str, ...]) -> subprocess.CompletedProcess[bytes]:
    """Run the program in a process of its own: the client reads where its hub is only once."""
    program = (sys.executable, "-m", "runner.cli.root")
    return subprocess.run([*program, *command], capture_output=True)


def _calls() -> list[tuple[str, int]]:
    """Kind and number within the kind of each call of the main thread on the output."""
    seen = dict.fromkeys(CHANGING, 0)
    found = []
    lines = Path("trace").read_text().splitlines()
    main = lines[0].split()[0]
    for line in lines:
        call = re.match(rf"{main} +(\w+)\(", line)
        if call and call[1] in seen:
            seen[call[1]] += 1
            if f"{FOLDER}" in line:
                found.append((call[1], seen[call[1]]))
    return found


def _content() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in FOLDER.rglob("*") if p.is_file()}


def _kill_everywhere(hub: FakeHub, command: tuple[str, ...], count: int) -> None:
    assert _traced(command) == 0
    whole, calls = _content(), _calls()
    assert len(calls) >= 12
    assert {kind for kind, _ in calls} >= {"write", "rename", "mkdir"}
    for kind, n in calls[:: max(1, len(calls) // count) if count else 1]:
        shutil.rmtree(FOLDER, ignore_errors=True)
        hub.served.clear()
        code = _traced(command, f"{kind}:signal=KILL:when={n}")
        where = f"{kind} {n}"
        for name, data in _content().items():
            if not Path(name).name.startswith("."):
                assert data == whole[name], where
        assert _started(command).returncode == 0, where
        assert _content() == whole, where
        assert code != 0, where
        for name, data in hub.files.items():
            assert hub.served[name] <= len(data) + MAY_COME_TWICE


def test_killed_at_some_calls(hub: FakeHub):
    _kill_everywhere(hub, MODEL, 4)


@pytest.mark.full
def test_killed_at_every_call(hub: FakeHub):
    _kill_everywhere(hub, MODEL, 0)


@pytest.mark.full
def test_parts_of_a_data_set_killed_at_every_call(data_hub: FakeHub):
    _kill_everywhere(data_hub, DATA, 0)
