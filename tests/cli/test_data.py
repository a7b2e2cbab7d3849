"""`gptj data pile` and `text`: from raw text to records."""

from __future__ import annotations

import gzip
import json
import random
import re
import resource
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from backports import zstd

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from gptj_model.config import END_OF_TEXT_ID
from runner.cli.shared import progress
from runner.data.making import encoding, long_line
from runner.data.making.documents import document
from runner.data.making.tokenizer import load_tokenizer
from runner.data.reading.example import FEATURES
from runner.data.reading.records import is_compressed

DOCUMENTS = [
    "The quick brown fox.",
    "",
    "naïve 🦜 漢字、かな。\n\ttabs and  spaces \x00\x1f",
    "مرحبا 안녕하세요 Привет <|endoftext|> ﷽",
    "line\r\nline\u2028line",
    *(f"document {n} " * (n % 7 + 1) for n in range(40)),
]
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tokenizer_folder: Path) -> Callable[[Sequence[str]], list[int]]:
    """Return the stream that documents must become."""
    tokenizer = load_tokenizer(tokenizer_folder)
    return lambda texts: [i for t in texts for i in [*tokenizer.encode(t).ids, END_OF_TEXT_ID]]


@pytest.fixture
def data(gptj, workdir: Path, tokenizer_folder: Path):
    """Call `gptj data`, in this process alone unless told otherwise."""

    def call(kind: str, *arguments: object, length: int = LENGTH):
        common: tuple[object, ...] = ("--tokenizer", tokenizer_folder)
        common += ("--max-sequence-length", length, "--json")
        if "--processes" not in arguments:
            common += ("--processes", 1)
        return gptj("data", kind, *arguments, *common)

    return call


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink documents, pieces and chunks, so that the texts act as if they were gigabytes."""
    monkeypatch.setattr(document, "LONG", 200)
    monkeypatch.setattr(document, "PIECE", 32)
    monkeypatch.setattr(long_line, "_LONG_STRING", 20)
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 100)


def _stream(folder: str | Path) -> list[int]:
    """Return the tokens in records, read by TensorFlow."""
    found: list[int] = []
    for path in sorted(Path(folder).glob("*.tfrecord*")):
        kind = "GZIP" if is_compressed(path) else ""
        for raw in tf.data.TFRecordDataset(str(path), compression_type=kind):
            feature = tf.train.Example.FromString(raw.numpy()).features.feature
            ids, mask, labels = (feature[name].int64_list.value for name in FEATURES)
            found += [ids[0], *labels[: sum(mask)]]
    return found


def _content(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*.*")}


def _lines(texts: Sequence[Any], **options: Any) -> bytes:
    return b"".join(json.dumps({"text": t}, **options).encode() + b"\n" for t in texts)


def _refused(done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert done.stderr.count("error: ") == 1
    for word in words:
        assert word in done.stderr
    assert not done.json["ok"]
    assert not Path("data").exists()


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda p: p.write_bytes(_lines(DOCUMENTS)),
    "plain.jsonl": lambda p: p.write_bytes(BOM_UTF8 + _lines(DOCUMENTS, ensure_ascii=False)),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(_lines(DOCUMENTS))),
    "a.jsonl.zst": lambda p: p.write_bytes(zstd.compress(_lines(DOCUMENTS))),
    "frames.jsonl.zst": lambda p: p.write_bytes(
        zstd.compress(_lines(DOCUMENTS[:9])) + zstd.compress(_lines(DOCUMENTS[9:]))
    ),
    "a.parquet": lambda p: pq.write_table(pa.table({"text": DOCUMENTS, "n": range(45)}), p),
}  # fmt: skip


@pytest.mark.parametrize("limits", ["as they are", "small"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_token_once_and_in_order(name: str, limits: str, data, tokens, request):
    if limits == "small":
        request.getfixturevalue("small_limits")
    WRITERS[name](Path(name))
    done = data("pile", name)
    assert done.code == 0, done.stderr
    assert _stream("data") == tokens(DOCUMENTS)
    assert done.json["documents"] == len(DOCUMENTS)
    assert done.json["tokens"] == len(tokens(DOCUMENTS))
    assert done.json["bytes"] == len("".join(DOCUMENTS).encode())


def test_text_files_are_a_document_each(data, tokens, small_limits):
    texts = ["one", "two\nlines " * 60, "", "🦜" * 300]
    for n, text in enumerate(texts):
        Path(f"{n}.md").write_bytes(text.encode())
    Path("z.md.gz").write_bytes(gzip.compress(b"packed " * 50))
    Path("other").write_bytes(b"\xff")
    assert data("text", ".", "--glob", "*.md", "--glob", "*.gz", "--out", "../out").code == 0
    assert _stream("../out") == tokens([*texts, "packed " * 50])


def test_the_same_records_whatever_the_number_of_processes(data, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 100)
    Path("a.jsonl").write_bytes(_lines(DOCUMENTS))
    options = ("--short-seq-prob", 0.3, "--seed", 5, "--files-per-record", 7)
    for processes in (1, 3):
        out = f"out{processes}"
        done = data("pile", "a.jsonl", "--processes", processes, "--out", out, *options)
        assert done.code == 0, done.stderr
    assert _content("out1") == _content("out3")
    assert len(_content("out1")) > 5


def test_what_is_noted_beside_the_records(data, tokens):
    import hashlib

    Path("a.jsonl").write_bytes(_lines(DOCUMENTS))
    assert data("pile", "a.jsonl", "--files-per-record", 7, "--gzip").code == 0
    params = json.loads(Path("data/data_params.json").read_text())
    assert params["arguments"]["max_sequence_length"] == LENGTH
    assert params["arguments"]["compress"] is True
    assert params["counts"]["documents"] == len(DOCUMENTS)
    assert params["sources"] == {"a.jsonl": Path("a.jsonl").stat().st_size}
    files = {n: f for n, f in _content("data").items() if n != "data_params.json"}
    assert set(files) == set(params["files"])
    for name, content in files.items():
        stated = params["files"][name]
        assert stated["bytes"] == len(content)
        assert stated["sha256"] == hashlib.sha256(content).hexdigest()
    examples = [f["examples"] for f in params["files"].values()]
    assert sum(examples) == params["counts"]["examples"]
    assert set(examples[:-1]) == {7}
    assert _stream("data") == tokens(DOCUMENTS)


def test_parts_of_a_data_set_stay_apart(data, tokens):
    for name in ("train/01.jsonl", "train/00.jsonl", "val.jsonl", "test.jsonl"):
        path = Path("pile") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_lines([name]))
    done = data("pile", "pile", length=4)
    assert done.code == 0, done.stderr
    assert _stream("data/train") == tokens(["train/00.jsonl", "train/01.jsonl"])
    assert _stream("data/val") == tokens(["val.jsonl"])
    assert _stream("data/test") == tokens(["test.jsonl"])
    assert done.json["documents"] == 4
    assert done.json["parts"]["train"]["documents"] == 2


def test_progress_is_of_the_whole_job_and_names_its_parts(data, monkeypatch: pytest.MonkeyPatch):
    Path("pile/train").mkdir(parents=True)
    for name, count in (("train/0.jsonl", 300), ("train/1.jsonl", 100), ("val.jsonl", 100)):
        (Path("pile") / name).write_bytes(_lines([f"{n:05} text" for n in range(count)]))
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    done = data("pile", "pile")
    line = r"packing: (\d+) % \((train|val): [\d,]+ documents/s, [\d,]+ tokens/s, [\d.]+ MB/s\)(.*)"
    found = [re.fullmatch(line, shown) for shown in done.stderr.splitlines() if " % " in shown]
    assert len(found) > 5
    assert all(found)
    lines = [match.groups() for match in found if match]
    shares = [int(share) for share, _, _ in lines]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    at = {part: [int(share) for share, p, _ in lines if p == part] for part in ("train", "val")}
    assert max(at["train"]) == 80 < min(at["val"])
    assert all(re.fullmatch(r", \d+ s to go", left) for _, _, left in lines[1:])


def test_the_references_options(data, tokens):
    texts = ["ï¬‚ag cafe\u0301 schÃ¶n", "a @-@ b , c ( d )"]
    Path("a.jsonl").write_bytes(_lines(texts))
    assert data("pile", "a.jsonl", "--ftfy", "--out", "ftfy").code == 0
    assert _stream("ftfy") == tokens(["flag café schön", texts[1]])
    assert data("pile", "a.jsonl", "--wikitext-detokenize", "--out", "wiki").code == 0
    assert _stream("wiki") == tokens([texts[0], "a-b, c (d)"])
    Path("b.jsonl").write_bytes(_lines(["x <|endoftext|> y"]))
    assert data("pile", "b.jsonl", "--allow-special", "--out", "special").code == 0
    assert _stream("special").count(END_OF_TEXT_ID) == 2
    Path("c.jsonl").write_bytes(b'{"content": "text elsewhere"}\n')
    assert data("pile", "c.jsonl", "--text-key", "content", "--out", "key").code == 0
    assert _stream("key") == tokens(["text elsewhere"])


def test_remainders(data, tokens):
    Path("a.jsonl").write_bytes(_lines(DOCUMENTS))
    expected = tokens(DOCUMENTS)
    whole = len(expected) // (LENGTH + 1)
    assert data("pile", "a.jsonl", "--reference-remainder", "--out", "r").code == 0
    assert _stream("r") == expected[: whole * (LENGTH + 1)]
    options = ("--files-per-record", 5, "--no-write-remainder", "--out", "w")
    done = data("pile", "a.jsonl", *options)
    assert done.json["examples"] == whole // 5 * 5
    assert _stream("w") == expected[: whole // 5 * 5 * (LENGTH + 1)]


BAD_LINES = {
    "not JSON": (b'{"text": "a"', "is not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "is not JSON"),
    "a lone surrogate": (b'{"text": "\\ud800"}', "is not JSON"),
    "no text": (b'{"texts": "a"}', "has no 'text'"),
    "null": (b'{"text": null}', "'text' is null, expected a string"),
    "a number": (b'{"text": 5}', "'text' is a number, expected a string"),
    "a list": (b'["text"]', "holds a list, expected an object"),
    "too deep": (b"[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("padding", [0, 500], ids=["short", "long"])
@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_stops_or_is_counted(case: str, padding: int, data, tokens, small_limits):
    line, words = BAD_LINES[case]
    if padding:
        line = line[:-1] + b" " * padding + line[-1:]
    Path("a.jsonl").write_bytes(_lines(["one"]) + line + b"\n" + _lines(["two"]))
    _refused(data("pile", "a.jsonl"), 1, f"a.jsonl:2: {words}", "hint: ")
    done = data("pile", "a.jsonl", "--on-error", "skip")
    assert done.code == 0, done.stderr
    assert f"skipped: a.jsonl:2: {words}" in done.stderr
    assert (done.json["documents"], done.json["skipped"]) == (2, 1)
    assert _stream("data") == tokens(["one", "two"])
    assert (
        "a.jsonl:2" in json.loads(Path("data/data_params.json").read_text())["counts"]["places"][0]
    )


def test_a_long_line_with_bad_text(data, tokens, small_limits):
    bad = b'{"text": "' + b"word " * 100 + b"\xff" + b'"}\n'
    Path("a.jsonl").write_bytes(_lines(["one"]) + bad + _lines(["two"]))
    _refused(data("pile", "a.jsonl"), 1, "a.jsonl:2: is not JSON: bad UTF-8 or a bad escape")
    assert data("pile", "a.jsonl", "--on-error", "skip").json["skipped"] == 1
    assert _stream("data") == tokens(["one", "two"])


@pytest.mark.parametrize("length", [10, 1000])
def test_a_text_that_is_not_utf8(length: int, data, small_limits):
    Path("bad.txt").write_bytes(b"one\ntwo\nth\xffree\n" + b"x" * length)
    _refused(data("text", "bad.txt"), 1, "bad.txt:3: byte 0xff at")
    Path("good.txt").write_text("good")
    done = data("text", "bad.txt", "good.txt", "--on-error", "skip")
    assert (done.json["documents"], done.json["skipped"]) == (1, 1)


@pytest.mark.parametrize("kind", ["zst", "gz"])
def test_damaged_compression(kind: str, data, tokens):
    noise = [random.Random(n).randbytes(500).hex() for n in range(300)]
    packed = (zstd if kind == "zst" else gzip).compress(_lines(noise))
    path = Path(f"a.jsonl.{kind}")
    path.write_bytes(packed[: len(packed) // 2])
    _refused(data("pile", path), 1, "the compressed file is cut", "the last good line is")
    done = data("pile", path, "--on-error", "skip")
    assert done.json["skipped"] == 1
    kept = done.json["documents"]
    assert kept > 20
    assert _stream("data") == tokens(noise[:kept])
    assert f"a.jsonl.{kind}:{kept + 1}: " in done.stderr


def test_garbage_after_a_frame(data):
    Path("a.jsonl.zst").write_bytes(zstd.compress(_lines(DOCUMENTS)) + b"garbage")
    _refused(data("pile", "a.jsonl.zst"), 1, f"a.jsonl.zst:{len(DOCUMENTS) + 1}: ")


def test_a_frame_that_wants_two_gigabytes_of_memory(data):
    options = {zstd.CompressionParameter.window_log: 31}
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(_lines(["text"])) + compressor.flush()
    Path("a.jsonl.zst").write_bytes(packed)
    _refused(data("pile", "a.jsonl.zst"), 1, "a.jsonl.zst:1: the compressed file is damaged here")


def test_parquet_with_what_is_no_text(data, tokens):
    pq.write_table(pa.table({"text": ["one", None, "two"]}), "a.parquet")
    _refused(data("pile", "a.parquet"), 1, "a.parquet:1: 'text' is null, expected a string")
    assert data("pile", "a.parquet", "--on-error", "skip").json["skipped"] == 1
    assert _stream("data") == tokens(["one", "two"])
    pq.write_table(pa.table({"content": ["one"]}), "b.parquet")
    assert "has no column text, found 'content'" in data("pile", "b.parquet", "--force").stderr
    Path("c.parquet").write_bytes(b"PAR1 no more")
    assert "cannot be read as parquet" in data("pile", "c.parquet", "--force").stderr


def test_what_cannot_be_meant(data):
    Path("a.jsonl").write_bytes(_lines(["one"]))
    Path("a.xml").write_bytes(b"<a/>")
    _refused(data("pile"), 2, "nothing to read")
    _refused(data("pile", "missing"), 1, "missing: not found")
    _refused(data("pile", "a.xml"), 1, "a.xml: unknown format")
    _refused(
        data("pile", "a.jsonl", "--gzip", "--format", "hdf5"),
        2,
        "--gzip goes with",
    )
    _refused(data("pile", "a.jsonl", "--resume", "--force"), 2, "exclude each other")
    Path("empty.jsonl").write_bytes(b"")
    _refused(data("pile", "empty.jsonl"), 1, "too little text")
    Path("data").mkdir()
    Path("data/mine.json").write_text("mine")
    assert "already exists" in data("pile", "a.jsonl").stderr
    assert Path("data/mine.json").read_text() == "mine"
    assert data("pile", "a.jsonl", "--force").code == 0
    again = data("pile", "a.jsonl", "--resume")
    assert again.code == 0
    assert "reused 1 record files" in again.stderr


def test_hdf5_is_what_the_cs_client_reads(data):
    import h5py

    golden = {"chunks": (1, 3, LENGTH), "dtype": np.dtype("int32")}
    Path("a.jsonl").write_bytes(_lines(DOCUMENTS))
    assert data("pile", "a.jsonl", "--format", "hdf5", "--files-per-record", 9).code == 0
    assert data("pile", "a.jsonl", "--out", "tf").code == 0
    blocks = []
    for path in sorted(Path("data").glob("*.h5")):
        with h5py.File(path) as file:
            assert list(file) == ["data"]
            dataset = file["data"]
            assert {k: getattr(dataset, k) for k in golden} == golden
            assert dict(file.attrs) == {"n_examples": len(dataset)}
            blocks.append(dataset[()])
    rows = []
    for raw in tf.data.TFRecordDataset("tf/records-00000.tfrecord"):
        feature = tf.train.Example.FromString(raw.numpy()).features.feature
        rows.append([feature[name].int64_list.value for name in FEATURES])
    assert np.array_equal(np.concatenate(blocks), rows)


def test_a_full_disk(data):
    """A limit on the size of files stands in for it: EFBIG comes where ENOSPC would."""
    Path("a.jsonl").write_bytes(_lines(DOCUMENTS * 30))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        done = data("pile", "a.jsonl", "--files-per-record", 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code in (0, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        done = data("pile", "a.jsonl", "--files-per-record", 50, "--out", "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 1
    assert "File too large" in done.stderr
    assert not Path("full").exists()
