"""Source files: every format and compression gives the same records, and damage has its place."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from gptj_model.errors import DataFault
from runner.data.making.documents import document, streams
from runner.data.making.documents.document import Reading
from runner.data.making.documents.tables import read_arrow
from tests.small_tokenizer import write_vocabulary

ROWS = [
    {"question": "What is it?", "answer": "An émigré’s “hat”, 🦜\nand more."},
    {"question": 'Two\nlines, with "quotes"', "answer": "yes"},
    *({"question": f"question {n}", "answer": f"answer {n} " * (n % 5 + 1)} for n in range(30)),
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CHECKSUM = zstd.CompressionParameter.checksum_flag
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstd.compress(data, options={CHECKSUM: 1}),
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.fixture
def data(gptj, workdir: Path):
    """Call `gptj data` in this process, with a small tokenizer."""
    Path("tokenizer").mkdir()
    write_vocabulary(Path("tokenizer"))

    def call(kind: str, *arguments: object):
        common: list[object] = ["--tokenizer", "tokenizer", "--max-sequence-length", 64, "--json"]
        if "--processes" not in arguments:
            common += ["--processes", 1]
        if kind == "instruct" and "--columns" not in arguments:
            common += ["--columns", "prompt=question,completion=answer"]
        if kind == "pile" and "--text-key" not in arguments:
            common += ["--text-key", "answer"]
        return gptj("data", kind, *arguments, *common)

    return call


def _table(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


TEXTS = {
    ".jsonl": LINES,
    ".json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    ".csv": _table(","),
    ".tsv": _table("\t"),
}


def _arrow(path: Path, rows: list[dict[str, Any]], *, has_index: bool = False) -> None:
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_file if has_index else pa.ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def _records(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if ".tfrecord" in p.name}


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "LONG", 300)
    monkeypatch.setattr(document, "PIECE", 32)


@pytest.mark.parametrize("kind", ["pile", "instruct"])
@pytest.mark.parametrize("limits", ["as they are", "small"])
def test_every_format_and_compression(kind: str, limits: str, data, request):
    if limits == "small":
        request.getfixturevalue("small_limits")
    Path("plain.jsonl").write_bytes(LINES)
    assert data(kind, "plain.jsonl").code == 0
    expected = _records("data")
    assert expected
    for suffix, content in TEXTS.items():
        for packed, pack in PACK.items():
            path = Path(f"a{suffix}{packed}")
            path.write_bytes(pack(content))
            done = data(kind, path, "--out", f"out{path.name}")
            assert done.code == 0, f"{path}: {done.stderr}"
            assert "note:" not in done.stderr
            assert _records(f"out{path.name}") == expected, path
    pq.write_table(pa.Table.from_pylist(ROWS), "a.parquet", row_group_size=7)
    _arrow(Path("stream.arrow"), ROWS)
    _arrow(Path("file.arrow"), ROWS, has_index=True)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert data(kind, name, "--out", f"out-{name}").code == 0
        assert _records(f"out-{name}") == expected, name


def _saved(folder: Path, **state: Any) -> None:
    """Write a folder as `datasets.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-00002.arrow" for n in range(2)]
    _arrow(folder / names[0], ROWS[:20])
    _arrow(folder / names[1], ROWS[20:])
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **state}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_folder_of_datasets(data):
    Path("plain.jsonl").write_bytes(LINES)
    assert data("instruct", "plain.jsonl").code == 0
    _saved(Path("saved/train"))
    _saved(Path("saved/test"))
    Path("saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    _arrow(Path("saved/train/cache-123.arrow"), ROWS[:3])
    done = data("instruct", "saved", "--out", "both")
    assert done.code == 0, done.stderr
    assert _records("both/train") == _records("both/test") == _records("data")
    _saved(Path("picked"), _indices_data_files=[{"filename": "indices.arrow"}])
    done = data("instruct", "picked", "--out", "no")
    assert done.code == 1
    assert "picked/state.json: the data set is a selection" in done.stderr
    assert "flatten_indices" in done.stderr
    Path("saved/test/data-00001-of-00002.arrow").unlink()
    done = data("instruct", "saved", "--out", "no")
    assert done.code == 1
    assert "data-00001-of-00002.arrow: not found, but saved/test/state.json lists it" in done.stderr
    Path("bad.arrow").write_bytes(b"no arrow")
    done = data("instruct", "bad.arrow", "--out", "no")
    assert done.code == 1
    assert "bad.arrow: cannot be read as Arrow" in done.stderr


@pytest.mark.parametrize("kind", ["pile", "instruct", "text"])
def test_a_byte_order_mark_is_removed(kind: str, data):
    for suffix, content in TEXTS.items():
        for mark, name in ((b"", "without"), (codecs.BOM_UTF8, "with")):
            Path(f"{name}{suffix}").write_bytes(mark + content)
            done = data(kind, f"{name}{suffix}", "--out", f"{name}-{suffix}")
            assert done.code == 0, done.stderr
        assert _records(f"with-{suffix}") == _records(f"without-{suffix}")


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32", "UTF-16LE", "UTF-16BE", "UTF-32BE"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_other_encodings_are_named(encoding: str, name: str, data):
    text = TEXTS.get(Path(name).suffix, LINES).decode().encode(encoding)
    Path(name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    done = data("pile", name)
    assert done.code == 1
    assert f"{name}:1: the text is {encoding}, expected UTF-8" in done.stderr
    assert f"iconv -f {encoding} -t UTF-8" in done.stderr


@pytest.mark.parametrize("said", PACK)
@pytest.mark.parametrize("true", PACK)
def test_the_content_says_how_a_file_is_compressed(true: str, said: str, data):
    Path(f"a.jsonl{said}").write_bytes(PACK[true](LINES))
    done = data("pile", f"a.jsonl{said}")
    assert done.code == 0, done.stderr
    assert done.json["documents"] == len(ROWS)
    found, named = streams.COMPRESSED.get(true), streams.COMPRESSED.get(said)
    noted = f"note: a.jsonl{said}: is {f'compressed with {found}' if found else 'not compressed'}"
    assert (noted in done.stderr) == (true != said)
    assert named is None or true == said or f"its name says {named}" in done.stderr


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_cut_and_damaged_compression(name: str, suffix: str, data):
    noise = [{"question": os.urandom(300).hex(), "answer": "x"} for _ in range(100)]
    text = "\n".join(map(json.dumps, noise))
    if name == "a.json":
        text = f"[{','.join(map(json.dumps, noise))}]"
    if name == "a.csv":
        text = "question,answer\n" + "\n".join(f"{r['question']},x" for r in noise)
    packed = PACK[suffix](text.encode())
    path = Path(name + suffix)
    path.write_bytes(packed[: len(packed) // 2])
    done = data("pile", path)
    assert done.code == 1
    assert f"{path}:" in done.stderr
    assert "the compressed file is cut" in done.stderr
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    path.write_bytes(damaged)
    done = data("pile", path)
    assert done.code == 1, done.stdout
    assert f"{path}:" in done.stderr


BAD = {
    "a.csv": [
        (b"question,answer\na,b,c\n", "a.csv:2: has 3 fields, expected 2 as the header has"),
        (b'question,answer\na,b\n"a,b\n', "a.csv:3: is not CSV: unexpected end of data"),
        (b"question,answer\na,\xff\n", "a.csv:2: is not UTF-8"),
        (b"answer,answer\na,b\n", "a.csv:1: names 'answer' twice"),
        (b"question;answer\na;b\n", "a.csv:1: has ';' between its fields, expected ','"),
        (b"question,reply\na,b\n", "a.csv:2: has no 'answer', found 'question', 'reply'"),
        (b"question,answer\na," + b"x" * 400 + b"\n", "a.csv:2: a line has more than 300 bytes"),
    ],
    "a.json": [
        (b'[\n{"answer": "a"},\n{"answer": \n5}\n]', "a.json:3: 'answer' is a number"),
        (b'[\n{"answer": "a"},\n{"answer": \nno}\n]', "a.json:4: is not JSON"),
        (b'[\n{"answer": "a"},\n]', "a.json:3: is not JSON"),
        (b'{\n "data": []\n}', "a.json:1: holds one object over several lines"),
        (b'[\n{"answer": "a"}\n', "a.json:3: the list has no end"),
        (b'[{"answer": "a"}]\n[]', "a.json:2: something follows the list"),
        (b'[{"answer": "a"},\n["' + b'x", "' * 200 + b'"]]', "a.json:2: has more than 300 bytes"),
    ],
    "a.jsonl": [(b'{"text": "a"}\n', "a.jsonl:1: has no 'answer', found 'text'")],
}


@pytest.mark.parametrize(
    ("name", "content", "words"), [(n, *case) for n, cases in BAD.items() for case in cases]
)
def test_bad_documents_have_their_place(name: str, content: bytes, words: str, data, small_limits):
    Path(name).write_bytes(content)
    done = data("pile", name)
    assert done.code == 1, done.stdout
    assert words in done.stderr
    assert done.stderr.count("hint: ") == (" twice" not in words)
    if "has no 'answer'" in words:
        assert "--text-key" in done.stderr


@pytest.mark.parametrize("has_index", [False, True])
def test_any_damaged_byte_of_arrow_is_an_error_or_other_text(has_index: bool, tmp_path: Path):
    """Arrow itself trusts the offsets in a file: a process would end without a word."""
    path = tmp_path / "a.arrow"
    _arrow(path, ROWS[:3], has_index=has_index)
    good = path.read_bytes()
    faults = 0
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        try:
            rows = list(read_arrow(path, Reading(rows=True, spool=tmp_path)))
        except DataFault:
            faults += 1
        else:
            assert len(rows) <= 3
    assert faults > 50


def test_columns_that_are_no_text_are_ignored(data):
    when = pa.scalar(1, pa.timestamp("ns"))
    rows = [{**row, "image": b"\xff", "when": when, "n": None} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    assert data("instruct", "a.parquet").json["documents"] == len(ROWS)
    done = data("instruct", "a.parquet", "--columns", "prompt=question,completion=image",
                "--out", "no")  # fmt: skip
    assert "a.parquet:0: has no 'image', found 'question', 'answer', 'n'" in done.stderr


def test_names_of_special_tokens_are_counted(data):
    rows = [{"answer": "one<|endoftext|>two<|endoftext|>"}, {"answer": "three"}]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = data("pile", "a.jsonl")
    assert done.json["special_names"] == 2
    assert "hold 2 names of special tokens, such as <|endoftext|>" in done.stderr
    assert "--allow-special" in done.stderr
    done = data("pile", "a.jsonl", "--allow-special", "--out", "special")
    assert done.json["special_names"] == 0
    assert "--allow-special" not in done.stderr
