"""Texts and records in gs://, with a local server of Google Cloud Storage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.data.remote import path as remote_path
from tests.cli.object_storage import BUCKET, gs_server
from tests.small_tokenizer import write_vocabulary


@pytest.fixture(scope="module")
def files() -> Iterator[Any]:
    """Client of a server of this module."""
    with gs_server() as client:
        yield client


def test_there_and_back(files: Any, workdir: Path, gptj, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    monkeypatch.setattr(remote_path, "BLOCK", 2**18)
    write_vocabulary(workdir)
    lines = "".join(json.dumps({"text": f"hello world {n}"}) + "\n" for n in range(9000))
    Path("a.jsonl").write_text(lines)
    files.pipe_file(f"{BUCKET}/raw/a.jsonl", lines.encode())
    common = ("--tokenizer", ".", "--max-sequence-length", 32, "--processes", 1, "--json", "--out")
    assert gptj("data", "pile", "a.jsonl", *common, "here").code == 0
    out = f"gs://{BUCKET}/records"
    done = gptj("data", "pile", f"gs://{BUCKET}/raw", *common, out)
    assert done.code == 0, done.stderr
    for path in Path("here").glob("*.tfrecord"):
        assert files.cat_file(f"{BUCKET}/records/{path.name}") == path.read_bytes()
    done = gptj("data", "pile", f"gs://{BUCKET}/raw", *common, out, "--resume")
    assert done.code == 0, done.stderr
    done = gptj("data", "inspect", out, "--json")
    assert done.code == 0, done.stderr
    assert done.json["examples"] > 1000


@pytest.mark.parametrize(("address", "said"), [
    (f"gs://{BUCKET}/absent", f"gs://{BUCKET}/absent: not found"),
    ("gs://absent/a", "gs://absent"),
])  # fmt: skip
def test_what_is_absent(address: str, said: str, files: Any, workdir: Path, gptj):
    write_vocabulary(workdir)
    done = gptj("data", "pile", address, "--tokenizer", ".")
    assert done.code == 1
    assert said in done.stderr
    assert done.stderr.count("\n") <= 2
