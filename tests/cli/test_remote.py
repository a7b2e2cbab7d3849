"""Texts and records in object storage, with a local S3 server."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runner.data.remote import path as remote_path
from runner.data.remote import staged_records, storage, upload
from tests.cli.object_storage import BUCKET, forget_clients, s3_server
from tests.conftest import make_checkpoint
from tests.small_tokenizer import write_vocabulary

ROWS = [{"text": f"hello world {n} " * (n % 5 + 1)} for n in range(300)]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """Client of the server of this module."""
    with s3_server() as files:
        yield files


@pytest.fixture
def files(server: Any, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Client of an empty bucket; ./tok has a tokenizer, and records are copied to ./cache."""
    for key in server.find(BUCKET):
        server.rm_file(key)
    Path("tok").mkdir()
    write_vocabulary(Path("tok"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    return server


@pytest.fixture
def sources(files: Any) -> Path:
    """Folder raw/, here and in the bucket, with files of several formats."""
    raw = Path("raw")
    (raw / "val").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (raw / "train.jsonl").write_text(lines)
    (raw / "train2.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (raw / "val" / "a.txt").write_text("hello " * 500)
    (raw / "train3.csv").write_text("text\nhello\nworld\n")
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, raw / "train4.parquet")
    with (
        pa.OSFile(str(raw / "train5.arrow"), "wb") as out,
        pa.ipc.new_stream(out, table.schema) as stream,
    ):
        stream.write_table(table)
    for path in raw.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{BUCKET}/{path}", path.read_bytes())
    return raw


PILE = ("--tokenizer", "tok", "--max-sequence-length", 32, "--files-per-record", 40)
ONE = (*PILE, "--processes", 1, "--json")
OUT = f"s3://{BUCKET}/records"


def _content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _objects(files: Any, name: str = "records") -> dict[str, bytes]:
    prefix = f"{BUCKET}/{name}/"
    return {key.removeprefix(prefix): files.cat_file(key) for key in files.find(prefix)}


def _records(content: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in content.items() if "tfrecord" in name}


def test_sources_are_read_as_from_the_disk(sources: Path, gptj, monkeypatch):
    monkeypatch.setattr(remote_path, "BLOCK", 2000)
    assert gptj("data", "pile", "raw", *ONE, "--out", "here").code == 0
    done = gptj("data", "pile", f"s3://{BUCKET}/raw", *ONE, "--out", "there")
    assert done.code == 0, done.stderr
    assert _records(_content(Path("there"))) == _records(_content(Path("here")))
    stated = json.loads(Path("there/train/data_params.json").read_text())["sources"]
    assert stated[f"s3://{BUCKET}/raw/train.jsonl"] == (sources / "train.jsonl").stat().st_size
    one = f"s3://{BUCKET}/raw/train.jsonl"
    done = gptj("data", "instruct", one, "--columns", "prompt=text,completion=text", *ONE,
                "--out", "pairs")  # fmt: skip
    assert done.json["shapes"] == {"prompt and completion": 300}


def test_a_bad_line_has_its_address(files: Any, gptj):
    files.pipe_file(f"{BUCKET}/a.jsonl", b'{"text": "a"}\n{"text"\n')
    done = gptj("data", "pile", f"s3://{BUCKET}/a.jsonl", *ONE)
    assert done.code == 1
    assert f"error: s3://{BUCKET}/a.jsonl:2: is not JSON" in done.stderr


def test_output_is_uploaded_and_found_complete(sources: Path, files: Any, gptj):
    assert gptj("data", "pile", "raw", *ONE, "--out", "here").code == 0
    done = gptj("data", "pile", "raw", *ONE, "--out", OUT)
    assert done.code == 0, done.stderr
    assert done.json["output"] == OUT
    assert _objects(files) == _content(Path("here"))
    assert not list(Path().glob("*staging*"))
    before = _objects(files)

    done = gptj("data", "pile", "raw", *ONE, "--out", OUT)
    assert done.code == 2
    assert f"{OUT}: already exists" in done.stderr
    done = gptj("data", "pile", "raw", *ONE, "--out", OUT, "--resume")
    assert done.code == 0, done.stderr
    assert done.json["files"] == len(_records(before))
    done = gptj("data", "pile", "raw", *ONE, "--out", OUT, "--resume", "--seed", 5)
    assert done.code == 2
    assert f"{OUT}: already exists, made from other sources" in done.stderr
    assert _objects(files) == before
    files.rm_file(f"{BUCKET}/records/train/records-00001.tfrecord")
    done = gptj("data", "pile", "raw", *ONE, "--out", OUT, "--resume")
    assert done.code == 0, done.stderr
    assert _objects(files) == before

    for name in before:
        files.pipe_file(f"{BUCKET}/records/other/{name}", b"theirs")
    files.pipe_file(f"{BUCKET}/records/note.txt", b"mine")
    Path("bad.jsonl").write_text("{")
    done = gptj("data", "pile", "bad.jsonl", *ONE, "--out", OUT, "--force",
                "--staging", "stage")  # fmt: skip
    assert done.code == 1
    assert before.items() <= _objects(files).items()
    done = gptj("data", "pile", "raw/train.jsonl", *ONE, "--out", OUT, "--force",
                "--staging", "stage")  # fmt: skip
    assert done.code == 0, done.stderr
    found = _objects(files)
    assert found.pop("note.txt") == b"mine"
    assert all(found.pop(f"other/{name}") == b"theirs" for name in before)
    stated = json.loads(found["data_params.json"])["files"]
    assert {"data_params.json", *stated} == set(found)
    assert not any(Path("stage").iterdir())


@pytest.mark.parametrize("at", [0, 2, -1])
def test_an_interrupted_upload_resumes(at: int, sources: Path, files: Any, gptj, monkeypatch):
    assert gptj("data", "pile", "raw", *ONE, "--out", "here").code == 0
    whole = _content(Path("here"))
    put, names = upload.Upload._put, []

    def stopping(self: upload.Upload, name: str, path: Path) -> None:
        if len(names) == at % len(whole):
            raise KeyboardInterrupt
        names.append(name)
        put(self, name, path)

    with monkeypatch.context() as patched:
        patched.setattr(upload.Upload, "_put", stopping)
        done = gptj("data", "pile", "raw", *ONE, "--out", OUT)
    assert done.code == 130
    assert "--resume" in done.stderr
    there = _objects(files)
    stated = [name for name in there if name.endswith("data_params.json")]
    assert len(there) == at % len(whole)
    assert len(stated) == (1 if at == -1 else 0)  # that of val/ is the last
    done = gptj("data", "pile", "raw", *ONE, "--out", OUT)
    assert done.code == 2
    assert "--resume" in done.stderr
    uploaded: list[str] = []

    def noted(self: upload.Upload, name: str, path: Path) -> None:
        uploaded.append(name)
        put(self, name, path)

    monkeypatch.setattr(upload.Upload, "_put", noted)
    done = gptj("data", "pile", "raw", *ONE, "--out", OUT, "--resume")
    assert done.code == 0, done.stderr
    assert _objects(files) == whole
    records = set(names) - set(stated)
    assert not records & set(uploaded)
    assert not list(Path().glob("*staging*"))


def test_a_changed_source_is_noticed(sources: Path, files: Any, gptj, monkeypatch):
    call = ("data", "pile", f"s3://{BUCKET}/raw/train.jsonl", *ONE)
    from runner.data.making import build

    close = build._PartWriter._close

    def stopping(self: Any, *arguments: object, **options: object) -> None:
        close(self, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(build._PartWriter, "_close", stopping)
        assert gptj(*call).code == 130
    data = files.cat_file(f"{BUCKET}/raw/train.jsonl")
    files.pipe_file(f"{BUCKET}/raw/train.jsonl", data.replace(b"world", b"wor1d"))
    done = gptj(*call, "--resume")
    assert done.code == 1
    assert f"s3://{BUCKET}/raw/train.jsonl: has changed since" in done.stderr
    files.pipe_file(f"{BUCKET}/raw/train.jsonl", data)
    assert gptj(*call, "--resume").code == 0


def test_training_reads_a_copy(sources: Path, files: Any, gptj, monkeypatch):
    make_checkpoint(Path("hf"), vocab_size=263, n_layer=1, n_positions=64, n_embd=32)
    assert gptj("convert", "hf", "--to", "tf", "--quiet").code == 0
    assert gptj("data", "pile", "raw/train.jsonl", *ONE, "--out", OUT).code == 0
    call = ("train", "--init-from", "converted", "--set", f"train_input.data_dir={OUT}",
            "--set", "train_input.max_sequence_length=32", "--set", "train_input.batch_size=2",
            "--max-steps")  # fmt: skip
    done = gptj(*call, 1)
    assert done.code == 0, done.stderr
    assert f"note: {OUT}: " in done.stderr
    assert f"copied to {staged_records.cache_folder()}" in done.stderr
    assert OUT in Path("model_dir/params.yaml").read_text()
    monkeypatch.setattr(staged_records, "_fetch", None)
    done = gptj("train", "--max-steps", 2, "--validate-only")
    assert done.code == 0, done.stderr
    assert "found in" in done.stderr
    done = gptj("eval", "--model", "model_dir", "--set", f"eval_input.data_dir={OUT}",
                "--set", "eval_input.max_sequence_length=32", "--set", "eval_input.batch_size=2",
                "--eval-steps", 1, "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    done = gptj("data", "inspect", OUT, "--json")
    assert done.json["examples"] > 10


def test_a_copy_is_checked(sources: Path, files: Any, gptj, monkeypatch):
    assert gptj("data", "pile", "raw", *ONE, "--out", OUT).code == 0
    key = f"{BUCKET}/records/train/records-00000.tfrecord"
    data = files.cat_file(key)
    files.pipe_file(key, data[:-1] + b"x")
    done = gptj("data", "inspect", OUT)
    assert done.code == 1
    assert f"{OUT}/train/records-00000.tfrecord: has the SHA-256" in done.stderr
    files.pipe_file(key, data)
    monkeypatch.setattr(staged_records.shutil, "disk_usage", lambda p: SimpleNamespace(free=10))
    done = gptj("data", "inspect", OUT)
    assert done.code == 1
    assert "0.00 GB are free" in done.stderr
    assert "XDG_CACHE_HOME" in done.stderr
    done = gptj("data", "pile", "raw", *ONE, "--out", f"{OUT}2")
    assert done.code == 1
    assert "hint: name a folder on another disk with --staging" in done.stderr
    done = gptj("data", "inspect", f"s3://{BUCKET}/raw/train.jsonl")
    assert done.code == 2
    assert "is a file, expected a folder of training records" in done.stderr


BAD: dict[str, tuple[str, int, str]] = {
    "no bucket": ("s3://absent/a", 1, "error: s3://absent: the bucket does not exist"),
    "no object": (f"s3://{BUCKET}/absent", 1, f"s3://{BUCKET}/absent: not found"),
    "no address": ("s3://", 2, "s3://: names no bucket, expected s3://BUCKET/PATH"),
    "another protocol": ("ftp://a/b", 2, "has the protocol ftp://, expected a path or one of s3"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_addresses(case: str, files: Any, gptj):
    address, code, said = BAD[case]
    for call in (("data", "pile", address, *ONE), ("data", "inspect", address)):
        done = gptj(*call)
        assert done.code == (2 if case == "no object" and "inspect" in call else code)
        assert done.stderr.count("error: ") == 1
        if not (case == "no object" and "inspect" in call):
            assert said in done.stderr


def test_no_network_no_credentials_no_access(files: Any, gptj, monkeypatch):
    call = ("data", "pile", f"s3://{BUCKET}/a.jsonl", *ONE)
    with monkeypatch.context() as patched:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        patched.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        forget_clients()
        done = gptj(*call)
        assert done.code == 1
        assert "the storage cannot be reached" in done.stderr
    with monkeypatch.context() as patched:
        patched.delenv("AWS_ACCESS_KEY_ID")
        patched.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patched.setenv("HOME", "nowhere")
        forget_clients()
        done = gptj(*call)
        assert done.code == 1
        assert "no valid credentials" in done.stderr
        assert "hint: set AWS_PROFILE" in done.stderr
    forget_clients()

    def refused(self: Any, *arguments: object, **options: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(storage.client("s3"), "info", refused)
    done = gptj(*call)
    assert done.code == 1
    assert "access is denied: Access Denied" in done.stderr


def test_a_file_that_vanishes_or_changes(files: Any, gptj, monkeypatch):
    monkeypatch.setattr(remote_path, "BLOCK", 2**18)
    key = f"{BUCKET}/a.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS) * 40
    begin = remote_path.RemotePath.open
    for change, said in (
        (lambda: files.rm_file(key), "has vanished while it was read"),
        (lambda: files.pipe_file(key, lines[::-1].encode()), "has changed while it was read"),
    ):
        files.pipe_file(key, lines.encode())
        opened: list[int] = []

        def opening(self: Any, mode: str = "rb", change: Any = change, opened: Any = opened) -> Any:
            found = begin(self, mode)
            opened.append(1)
            if len(opened) == 3:  # after the two looks at how it is compressed
                found.peek(1)
                change()
            return found

        monkeypatch.setattr(remote_path.RemotePath, "open", opening)
        done = gptj("data", "pile", f"s3://{key}", *ONE, "--force")
        assert done.code == 1
        assert f"s3://{key}: {said}" in done.stderr

    def replaced(self: Any, mode: str = "rb") -> Any:
        files.pipe_file(key, b'{"text": "other"}')
        return begin(self, mode)

    monkeypatch.setattr(remote_path.RemotePath, "open", replaced)
    files.pipe_file(key, lines.encode())
    done = gptj("data", "pile", f"s3://{key}", *ONE, "--force")
    assert done.code == 1
    assert f"s3://{key}: has changed while it was read" in done.stderr


@pytest.mark.parametrize(("module", "address"), [("s3fs", "s3://b/a"), ("gcsfs", "gs://b/a")])
def test_the_extra_is_named(module: str, address: str, files: Any, gptj, monkeypatch):
    storage.client.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    done = gptj("data", "pile", address, *ONE)
    assert done.code == 1
    assert f"{module!r} is not installed" in done.stderr
    assert "[remote]'`" in done.stderr
    storage.client.cache_clear()


def test_what_does_not_go_with_storage(sources: Path, files: Any, gptj):
    done = gptj("data", "pile", "raw", *ONE, "--staging", "x")
    assert done.code == 2
    assert "--staging has no effect unless --out is in object storage" in done.stderr
    done = gptj("data", "pile", f"s3://{BUCKET}/raw", "--download", *ONE)
    assert done.code == 2
    assert "--download fetches into a folder of this machine" in done.stderr
    done = gptj(
        "data", "pile", f"s3://{BUCKET}/raw", *ONE, "--out", f"s3://{BUCKET}/raw", "--force"
    )
    assert done.code == 2
    assert "holds the source file" in done.stderr
    shutil.rmtree("raw")
