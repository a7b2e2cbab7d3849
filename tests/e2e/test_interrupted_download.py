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
from pathlib import Path

import pytest

from tests.cli.fake_hub import REPOSITORY, FakeHub, serving

pytestmark = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "strace -V"], capture_output=True).returncode != 0,
    reason="needs strace",
)

CHANGING = ("write", "ftruncate", "fsync", "rename", "unlink", "mkdir")
DOWNLOAD = (sys.executable, "-B", "-m", "runner.cli.root", "download", REPOSITORY, "--quiet")
FOLDER = Path(REPOSITORY.rpartition("/")[2])
WEIGHTS = bytes(range(256)) * 16 * 1024
#: Bytes that may come twice when a download was killed.
MAY_COME_TWICE = 64 * 2**20


@pytest.fixture
def hub(small_hf: Path, workdir: Path) -> Iterator[FakeHub]:
    config = (small_hf / "config.json").read_bytes()
    hub = FakeHub({"config.json": config, "vocab.json": b"{}", "model.safetensors": WEIGHTS})
    with serving(hub) as endpoint:
        home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(workdir / "home"), "HF_TOKEN": ""}
        os.environ.update(home)
        yield hub
        for name in home:
            del os.environ[name]


def _traced(inject: str = "") -> int:
    strace = ["strace", "-f", "-y", "-qqq", "-o", "trace", "-e", f"trace={','.join(CHANGING)}"]
    strace += ["-e", "signal=none", *(["-e", f"inject={inject}"] if inject else [])]
    return subprocess.run([*strace, *DOWNLOAD], capture_output=True).returncode


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
    return {p.name: p.read_bytes() for p in FOLDER.iterdir()}


def _kill_everywhere(hub: FakeHub, count: int) -> None:
    assert _traced() == 0
    whole, calls = _content(), _calls()
    assert len(calls) >= 12
    assert {kind for kind, _ in calls} >= {"write", "rename", "mkdir"}
    for kind, n in calls[:: max(1, len(calls) // count) if count else 1]:
        shutil.rmtree(FOLDER, ignore_errors=True)
        hub.served.clear()
        code = _traced(f"{kind}:signal=KILL:when={n}")
        where = f"{kind} {n}"
        for path in FOLDER.iterdir() if FOLDER.exists() else ():
            if not path.name.startswith("."):
                assert path.read_bytes() == whole[path.name], where
        assert subprocess.run(DOWNLOAD, capture_output=True).returncode == 0, where
        assert _content() == whole, where
        assert code != 0, where
        assert hub.served["model.safetensors"] <= len(WEIGHTS) + MAY_COME_TWICE


def test_killed_at_some_calls(hub: FakeHub):
    _kill_everywhere(hub, 6)


@pytest.mark.full
def test_killed_at_every_call(hub: FakeHub):
    _kill_everywhere(hub, 0)
