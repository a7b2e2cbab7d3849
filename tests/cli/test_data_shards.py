"""`--shard` of `gptj data` and `gptj data merge`: records made by many machines, and joined."""

from __future__ import annotations

import ast
import errno
import gzip
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from gptj_model.errors import UsageError
from runner.cli.data.shard import Share, find_shard
from runner.cli.root import main
from runner.data import merge as merging
from runner.data.making import encoding, long_line
from runner.data.making.build import Counts, add_up
from runner.data.making.documents import document
from runner.data.making.documents.document import Raw, Reading
from runner.data.making.shards import deal
from runner.data.making.sources import read
from runner.data.reading.hdf5 import read_blocks
from runner.data.reading.records import find_records, read_examples
from tests.conftest import make_checkpoint
from tests.doc_commands import REPOSITORY
from tests.small_tokenizer import END_ID, VOCAB, write_vocabulary

PAGE = (REPOSITORY / "docs" / "data.md").read_text()
OPTIONS = ("--tokenizer", "tokenizer", "--max-sequence-length", "32", "--processes", "1")
SCHEDULER = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX",
             "SLURM_ARRAY_TASK_COUNT", "JOB_COMPLETION_INDEX")  # fmt: skip


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SCHEDULER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data(gptj, workdir: Path):
    """Call `gptj data` in this process, with a small tokenizer."""
    Path("tokenizer").mkdir()
    write_vocabulary(Path("tokenizer"))
    return lambda kind, *arguments: gptj("data", kind, *arguments, *OPTIONS, "--json")


def _lines(count: int, name: str = "a") -> bytes:
    texts = (f"{name} {n} hello world é🦜 " * (n % 7 + 1) for n in range(count))
    return b"".join(
        json.dumps({"text": t}, ensure_ascii=n % 2 == 0).encode() + b"\n"
        for n, t in enumerate(texts)
    )


def _documents(folder: str | Path) -> Counter[tuple[int, ...]]:
    """Return the documents below a folder of records as tokens, each with its number."""
    found: Counter[tuple[int, ...]] = Counter()
    for part in {p.parent for p in Path(folder).rglob("*.tfrecord")}:
        stream: list[int] = []
        for path in sorted(part.glob("*.tfrecord")):
            for _, example in read_examples(path, vocab_size=len(VOCAB)):
                ids, mask, labels = example.values()
                stream += [ids[0], *labels[: int(mask.sum())]]
        while stream:
            end = stream.index(END_ID)
            found[tuple(stream[:end])] += 1
            stream = stream[end + 1 :]
    return found


def _content(folder: str | Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()
    }


def _refused(done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert done.stderr.count("error: ") == 1
    for word in words:
        assert word in done.stderr


# Dealing


@given(
    files=st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=30),
    count=st.integers(1, 20),
)
def test_every_byte_is_dealt_once_and_evenly(files: list[tuple[int, bool]], count: int):
    sizes = [size for size, _ in files]
    dealt = deal(sizes, count, lambda n: files[n][1])
    assert len(dealt) == count
    assert all(pieces == sorted(pieces) for pieces in dealt)
    for n, (size, may_be_cut) in enumerate(files):
        pieces = sorted(piece for pieces in dealt for piece in pieces if piece.number == n)
        assert [p.begin for p in pieces] == [0, *(p.end for p in pieces)][: len(pieces)]
        assert pieces[-1].end == size
        assert len(pieces) == 1 or (may_be_cut and size * count > sum(sizes))
    whole = [p.end for pieces in dealt for p in pieces if (p.begin, p.end) == (0, sizes[p.number])]
    loads = [sum(p.end - p.begin for p in pieces) for pieces in dealt]
    assert max(loads) - min(loads) <= max(whole, default=0) + 1


def test_dealing_by_example():
    assert deal([5, 9, 1, 6], 2, lambda n: False) == [
        [(1, 0, 9), (2, 0, 1)],
        [(0, 0, 5), (3, 0, 6)],
    ]
    assert deal([10, 100, 10], 4, lambda n: True) == [
        [(0, 0, 10), (1, 0, 20)],
        [(1, 20, 40), (2, 0, 10)],
        [(1, 40, 70)],
        [(1, 70, 100)],
    ]
    assert deal([7], 3, lambda n: False) == [[(0, 0, 7)], [], []]
    assert deal([0, 0, 0], 2, lambda n: True) == [[(0, 0, 0), (2, 0, 0)], [(1, 0, 0)]]


CONTENTS = {
    "plain": _lines(3),
    "crlf": _lines(3).replace(b"\n", b"\r\n"),
    "no last newline": _lines(3)[:-1],
    "mark": BOM_UTF8 + _lines(2),
    "blank lines": b"\n\n" + _lines(1) + b"\n \n" + _lines(1) + b"\n",
    "a long line": _lines(1)
    + json.dumps({"text": "é word " * 80}, ensure_ascii=False).encode()
    + b"\n"
    + _lines(1),
    "a damaged long line": _lines(2) + b'{"words": "' + b"word " * 80 + b'"}\n' + _lines(1),
    "UTF-16": _lines(2).decode().encode("utf-16"),
    "damaged": b'{"text": 1}\n' + _lines(1) + b"no\n\xff\n" + _lines(1),
}


@pytest.mark.parametrize("rows", [False, True], ids=["texts", "rows"])
@pytest.mark.parametrize("name", CONTENTS)
def test_ranges_at_every_byte(name: str, rows: bool, tmp_path: Path, monkeypatch):
    """Any two cuts give all documents once, in order, with the lines of the file."""
    monkeypatch.setattr(document, "LONG", 300)
    monkeypatch.setattr(document, "PIECE", 32)
    monkeypatch.setattr(long_line, "_LONG_STRING", 20)
    path = tmp_path / "a.jsonl"
    path.write_bytes(CONTENTS[name])
    size = len(CONTENTS[name])
    reading = Reading(spool=tmp_path, rows=rows)

    def documents(ranges: dict[Path, tuple[int, int]]) -> list[tuple[Any, ...]]:
        found = list(read([path], reading, ranges=ranges))
        return [
            (item.where, item.data, item.more) if isinstance(item, Raw) else (str(item),)
            for item in found
        ]

    cached: dict[tuple[int, int], list[tuple[Any, ...]]] = {}

    def part(begin: int, end: int) -> list[tuple[Any, ...]]:
        if (begin, end) not in cached:
            cached[begin, end] = documents({path: (begin, end)})
        return cached[begin, end]

    expected = documents({})
    assert expected
    for a in range(1, size + 1):
        assert part(0, a) + part(a, size) == expected, a
        b = min(a + 7, size)
        assert part(0, a) + part(a, b) + part(b, size) == expected, (a, b)


# Shards by the command line


def _sources() -> None:
    for folder in ("train", "val"):
        Path("src", folder).mkdir(parents=True)
    Path("src/train/large.jsonl").write_bytes(_lines(90))
    Path("src/train/small.jsonl").write_bytes(_lines(4, "b"))
    Path("src/train/packed.jsonl.gz").write_bytes(gzip.compress(_lines(30, "c")))
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=9000)
    packed = (json.dumps({"text": "".join(letters[n : n + 300])}) for n in range(0, 9000, 300))
    Path("src/train/misnamed.jsonl").write_bytes(gzip.compress("\n".join(packed).encode()))
    pq.write_table(pa.table({"text": ["row 1", "row 2"]}), "src/train/e.parquet")
    Path("src/train/f.txt").write_text("one document")
    Path("src/val/a.jsonl").write_bytes(_lines(2, "v"))


def test_shards_have_every_document_once(data, gptj):
    _sources()
    assert data("pile", "src", "--out", "whole").code == 0
    indices: list[int] = []
    for n in range(5):
        done = data("pile", "src", "--out", "shards", "--shard", f"{n}/5")
        assert done.code == 0, done.stderr
        assert done.json["shard"] == {"index": n, "count": 5, "from": "--shard"}
        indices.append(done.json["documents"])
    assert len(set(indices)) > 1
    assert _documents("shards") == _documents("whole")
    assert max(_documents("whole").values()) == 1
    done = gptj("data", "merge", "shards", "--out", "merged", "--json")
    assert done.code == 0, done.stderr
    assert _documents("merged/train") == _documents("whole/train")
    assert _documents("merged/val") == _documents("whole/val")
    states = [
        json.loads(Path(f, "train/data_params.json").read_text()) for f in ("merged", "whole")
    ]
    same = ("documents", "bytes", "tokens")
    assert [{k: s["counts"][k] for k in same} for s in states] == [
        {k: states[1]["counts"][k] for k in same}
    ] * 2
    assert states[0]["sources"] == states[1]["sources"]
    assert states[0]["shards"]["count"] == len(states[0]["shards"]["files"]) == 5
    assert "shard" not in states[0]
    assert gptj("data", "inspect", "merged").code == 0
    # A merged folder is not what a run without shards would resume.
    _refused(data("pile", "src", "--out", "merged", "--resume"), 2, "merged: already exists")


@pytest.mark.parametrize("kind", ["instruct", "summarization", "text"])
def test_other_kinds_are_dealt(kind: str, data, gptj):
    rows = [
        {"prompt": f"hello {n} ", "completion": "a b", "article": f"a b c d {n}", "abstract": "a"}
        for n in range(40)
    ]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "summarization":  # needs GPT-J's own
        write_tokenizer(Path("tokenizer"))
    documents = []
    for n in range(3):
        done = data(kind, "a.jsonl", "--out", "shards", "--shard", f"{n}/3")
        assert done.code == 0, done.stderr
        documents.append(done.json["documents"])
    # `text` reads a whole file as one document, which is never cut.
    assert sum(documents) == (1 if kind == "text" else 40)
    assert documents.count(0) == (2 if kind == "text" else 0)
    assert gptj("data", "merge", "shards", "--out", "merged").code == 0


def test_an_error_names_the_line_of_the_file(data):
    lines = _lines(60).splitlines(keepends=True)
    lines[40] = b"no\n"
    Path("a.jsonl").write_bytes(b"".join(lines))
    assert data("pile", "a.jsonl", "--out", "shards", "--shard", "0/2").code == 0
    _refused(data("pile", "a.jsonl", "--out", "shards", "--shard", "1/2"), 1, "a.jsonl:41: is not")
    done = data("pile", "a.jsonl", "--out", "shards", "--shard", "1/2", "--on-error", "skip")
    assert "skipped: a.jsonl:41: is not JSON" in done.stderr


def test_a_shard_that_gets_nothing_succeeds_and_merges(data, gptj):
    Path("a.txt").write_text("hello world")
    for n in range(3):
        done = data("pile", "a.txt", "--out", "shards", "--shard", f"{n}/3")
        assert done.code == 0, done.stderr
        assert ("note: this shard has no example" in done.stderr) == (n > 0)
    assert list(_content("shards/shard-00002-of-00003")) == ["data_params.json"]
    assert data("pile", "a.txt", "--out", "shards", "--shard", "2/3", "--resume").code == 0
    assert gptj("data", "merge", "shards", "--out", "merged").code == 0
    assert sum(_documents("merged").values()) == 1
    for n in range(2):
        options = ("--reference-remainder", "--shard", f"{n}/2")
        assert data("pile", "a.txt", "--out", "empty", *options).code == 0
    _refused(gptj("data", "merge", "empty", "--out", "no"), 1, "empty: no shard has an example")


def test_random_choices_differ_between_shards(data):
    Path("a.jsonl").write_bytes(b'{"text": "' + b"a" * 100 + b'"}\n' * 1)
    line = json.dumps({"text": "a" * 100}) + "\n"
    Path("a.jsonl").write_text(line * 64)
    for n in range(2):
        options = ("--short-seq-prob", "0.5", "--shard", f"{n}/2")
        assert data("pile", "a.jsonl", "--out", "shards", *options).code == 0
    first, second = ({p: c for p, c in _content(f"shards/shard-0000{n}-of-00002").items()
                      if "tfrecord" in p} for n in range(2))  # fmt: skip
    assert first != second


KILLED = """
import os, signal, sys
from runner.data.making import build, encoding
encoding.CHUNK_BYTES = 300
close, count = build._PartWriter._close, []
def closed(*a, **k):
    close(*a, **k)
    count.append(1)
    if len(count) == int(os.environ["KILL"]):
        os.kill(os.getpid(), signal.SIGKILL)
build._PartWriter._close = closed
from runner.cli.root import main
sys.exit(main())
"""


def test_a_killed_shard_resumes_to_the_same_bytes(data, gptj, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 300)
    Path("src").mkdir()
    Path("src/a.jsonl").write_bytes(_lines(200))
    Path("src/b.txt").write_text("in another shard")
    command = ("pile", "src", "--shard", "1/3", "--files-per-record", "3")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "data", *command, *OPTIONS, "--out", "shards"],
        env={**os.environ, "KILL": "3", "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == -signal.SIGKILL
    _refused(data(*command, "--out", "shards"), 2, "an interrupted run exists")
    Path("src/b.txt").rename("src/c.txt")
    _refused(data(*command, "--out", "shards", "--resume"), 2, "has other sources or options")
    Path("src/c.txt").rename("src/b.txt")
    other = ("pile", "src", "--shard", "1/4", "--files-per-record", "3")
    _refused(data(*other, "--out", "shards", "--resume"), 2, "holds shard-00001-of-00003.partial")
    done = data(*command, "--out", "shards", "--resume")
    assert done.code == 0
    assert "reused 3 record files" in done.stderr
    processes = ("--processes", 2)
    assert gptj("data", *command, *OPTIONS, *processes, "--out", "whole").code == 0
    assert len(_content("whole")) > 5
    assert _content("shards") == _content("whole")


def test_a_shard_of_another_listing_is_not_resumed(data):
    Path("src").mkdir()
    Path("src/a.txt").write_text("the larger one")
    Path("src/b.txt").write_text("b")
    again = ("pile", "src", "--shard", "0/2", "--out", "shards", "--resume")
    assert data(*again).code == 0
    assert data(*again).code == 0
    # This shard still reads the same file.
    Path("src/b.txt").rename("src/c.txt")
    _refused(data(*again), 2, "already exists")


def test_machines_see_the_same_files_at_other_paths(data, gptj):
    for folder in ("here", "there"):
        Path(folder, "src").mkdir(parents=True)
        Path(folder, "src/a.txt").write_text("the larger one")
        Path(folder, "src/b.txt").write_text("b")

    def second(*options: str) -> None:
        source = ("there/src", "--out", "there/shards")
        assert data("pile", *source, "--shard", "1/2", *options).code == 0

    assert data("pile", "here/src", "--out", "here/shards", "--shard", "0/2").code == 0
    second()
    merge = ("data", "merge", "here/shards", "there/shards", "--out")
    assert gptj(*merge, "merged").code == 0
    Path("there/src/b.txt").rename("there/src/c.txt")
    second("--force")
    _refused(gptj(*merge, "no"), 1, "different listings")
    Path("there/src/c.txt").rename("there/src/b.txt")
    Path("there/src/b.txt").write_text("bb")
    second("--force")
    _refused(gptj(*merge, "no"), 1, "different listings")


def test_folders_that_a_shard_does_not_write_to(data):
    Path("src").mkdir()
    Path("src/a.jsonl").write_bytes(_lines(9))
    shard = ("pile", "src", "--shard", "0/2")
    _refused(data(*shard, "--out", "src/shards"), 2, "src/shards: lies inside the source src")
    assert data("pile", "src", "--out", "whole").code == 0
    _refused(data(*shard, "--out", "whole"), 2, "whole: holds data_params.json")
    assert data(*shard, "--out", "shards").code == 0
    done = data("pile", "src", "--shard", "0/3", "--out", "shards")
    _refused(done, 2, "holds shard-00000-of-00002, and this is shard 0 of 3", "--shard /16")
    _refused(data("pile", "--download", "--shard", "0/2"), 2, "--download fetches the whole")


# The environment


def _array(index: Any, low: Any, high: Any, count: Any) -> dict[str, str]:
    values = zip(SCHEDULER, (index, low, high, count), strict=False)
    return {name: str(value) for name, value in values if value is not None}


@pytest.mark.parametrize(
    ("share", "environment", "expected"),
    [
        (None, {}, None),
        (None, {"SLURM_ARRAY_TASK_ID": "", "SLURM_ARRAY_TASK_COUNT": ""}, None),
        (None, _array(0, 0, 15, 16), (0, 16)),
        (None, _array(3, 0, 15, 16), (3, 16)),
        (None, _array(16, 1, 16, 16), (15, 16)),
        (Share(0, 1), _array(3, 0, 15, 16), None),
        (Share(2, 4), _array(3, 0, 15, 16), (2, 4)),
        (Share(None, 16), _array(7, 3, 7, 2), (7, 16)),
        (Share(None, 16), {"JOB_COMPLETION_INDEX": "5"}, (5, 16)),
        (Share(None, 1), {"JOB_COMPLETION_INDEX": "0"}, None),
    ],
)
def test_shards_of_the_environment(share, environment, expected):
    shard = find_shard(share, environment)
    assert (shard and (shard.index, shard.count)) == expected


@pytest.mark.parametrize(
    ("share", "environment", "words"),
    [
        (None, _array(3, None, None, None), "SLURM_ARRAY_TASK_MIN is not set"),
        (None, _array(3, 0, 6, 4), "an array of 4 tasks from 0 to 6, expected all of 0 to N-1"),
        (None, _array(5, 3, 7, 5), "an array of 5 tasks from 3 to 7"),
        (None, _array(0, 0, 0, 1), "an array of 1 tasks"),
        (None, _array(9, 0, 3, 4), "is 9 in an array"),
        (None, _array("x", 0, 3, 4), "SLURM_ARRAY_TASK_ID is 'x'"),
        (None, {"JOB_COMPLETION_INDEX": "2"}, "does not say how many completions"),
        (None, {"JOB_COMPLETION_INDEX": "2", **_array(1, 0, 3, 4)}, "are both set"),
        (Share(None, 16), _array(16, 1, 16, 16), "shard 16 of 16 (from SLURM_ARRAY_TASK_ID)"),
        (Share(None, 4), {}, "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set"),
        (Share(4, 4), {}, "shard 4 of 4 (from --shard), expected 0 to 3"),
        (Share(0, 0), {}, "0 shards (from --shard), expected 1 to 99,999"),
    ],
)
def test_an_environment_that_says_too_little(share, environment, words, data, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    Path("a.txt").write_text("hello")
    options = (
        [f"--shard={'' if share.index is None else share.index}/{share.count}"] if share else []
    )
    _refused(data("pile", "a.txt", *options), 2, words)


@pytest.mark.parametrize("text", ["3", "a/b", "-1/4", "1/4/4", "", "1/", "1 /4", "+1/4", "٣/4"])
def test_malformed_shards(text: str, data):
    _refused(data("pile", "a.txt", "--shard", text), 2, "expected I/N with I from 0 to N-1")


def test_a_shard_of_the_environment_is_said(data, monkeypatch):
    Path("a.txt").write_text("hello")
    for name, value in _array(4, 1, 16, 16).items():
        monkeypatch.setenv(name, value)
    done = data("pile", "a.txt", "--out", "shards")
    assert "note: shard 3 of 16, from SLURM_ARRAY_TASK_ID; --shard 0/1" in done.stderr
    state = json.loads(Path("shards/shard-00003-of-00016/data_params.json").read_text())
    found = {key: state["shard"][key] for key in ("index", "count", "from")}
    assert found == {"index": 3, "count": 16, "from": "SLURM_ARRAY_TASK_ID"}
    assert data("pile", "a.txt", "--out", "whole", "--shard", "0/1").code == 0
    assert Path("whole/records-00000.tfrecord").is_file()


# Merging


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of one file, at ./shards of the folder."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tokenizer").mkdir()
    write_vocabulary(folder / "tokenizer")
    (folder / "a.jsonl").write_bytes(_lines(60))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for n in range(3):
            command = f"data pile a.jsonl --files-per-record 9 --out shards --shard {n}/3 --quiet"
            assert main([*command.split(), *OPTIONS]) == 0
    return folder


@pytest.fixture
def shards(made: Path, workdir: Path) -> Path:
    """A copy of the three shards, which a test may change, at ./shards."""
    return shutil.copytree(made / "shards", "shards")


def _folder(n: int) -> Path:
    return Path(f"shards/shard-0000{n}-of-00003")


def _edit(n: int, change: Callable[[dict[str, Any]], object]) -> None:
    path = _folder(n) / "data_params.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_merged_files_are_those_of_the_shards(shards: Path, gptj):
    before = _content("shards")
    done = gptj("data", "merge", "shards", "--out", "merged", "--json")
    assert done.code == 0, done.stderr
    assert done.json["shards"] == 3
    assert _content("shards") == before
    paths = [p for n in range(3) for p in sorted(_folder(n).glob("*.tfrecord"))]
    merged = sorted(Path("merged").glob("*.tfrecord"))
    assert [p.name for p in merged] == [f"records-{n:05d}.tfrecord" for n in range(len(paths))]
    assert all(a.samefile(b) for a, b in zip(paths, merged, strict=True))
    _refused(gptj("data", "merge", "shards", "--out", "merged"), 2, "merged: already exists")
    # The order and the place of the folders on the command line do not matter.
    Path("other").mkdir()
    _folder(1).rename(f"other/{_folder(1).name}")
    names = ("other", _folder(2), _folder(0), Path("other").resolve() / _folder(1).name)
    assert gptj("data", "merge", *names, "--out", "copied", "--copy").code == 0
    assert _content("copied") == _content("merged")
    assert not any(a.samefile(b) for a, b in zip(merged, Path("copied").glob("*.tf*"), strict=True))
    shutil.rmtree("shards")
    shutil.rmtree("other")
    assert gptj("data", "inspect", "merged", "--samples", "0").code == 0
    assert sum(_documents("merged").values()) == 60


def _remove(*numbers: int) -> None:
    for n in numbers:
        shutil.rmtree(_folder(n))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


FAULTS: dict[str, tuple[Callable[[], object], int, tuple[str, ...]]] = {
    "one missing": (lambda: _remove(1), 1, ("shard 1 of 3 is missing", "--shard 1/3")),
    "two missing": (lambda: _remove(0, 2), 1, ("shards 0 and 2 of 3 are missing",)),
    "one unfinished": (
        lambda: _folder(1).rename(f"{_folder(1)}.partial-gptj"), 1,
        ("shard 1 of 3 is missing", "left shard-00001-of-00003.partial-gptj", "--resume"),
    ),
    "one twice": (
        lambda: shutil.copytree(_folder(1), "shards/shard-00009-of-00003"), 1,
        ("shard-00009-of-00003: is shard 1 of 3, and so is shards/shard-00001-of-00003",),
    ),
    "another count": (
        lambda: _edit(1, lambda v: v["shard"].update(count=4)), 1, ("are of 3 and of 4 shards",)
    ),
    "another option": (
        lambda: _edit(2, lambda v: v["arguments"].update(seed=9)), 1,
        ("made in different ways: seed is 0 and 9",),
    ),
    "another version of tokenizers": (
        lambda: _edit(2, lambda v: v.update(tokenizers="0.1")), 1, ("and 0.1",)
    ),
    "another backend": (
        lambda: _edit(2, lambda v: v["tokenizer_backend"].update(version="0.1")), 1,
        ("tokenizer_backend is ",),
    ),
    "another version of this program": (
        lambda: _edit(2, lambda v: v["tool"].update(version="0.0")), 1, ("tool is gptj ",)
    ),
    "another listing": (
        lambda: _edit(2, lambda v: v["shard"].update(listing_sha256="00")), 1,
        ("different listings of the sources",),
    ),
    "no shard": (
        lambda: _edit(2, lambda v: v.pop("shard")), 1, ("expected a shard",)
    ),
    "damaged facts": (
        lambda: _edit(2, lambda v: v["shard"].update(index=3)), 1, ("is not what `gptj data",)
    ),
    "damaged counts": (
        lambda: _edit(2, lambda v: v["counts"].update(more=3)), 1, ("is not what `gptj data",)
    ),
    "no JSON": (
        lambda: _cut(_folder(2) / "data_params.json"), 1, ("data_params.json: is not JSON",)
    ),
    "no data_params.json": (
        lambda: (_folder(2) / "data_params.json").unlink(), 1, ("expected a complete shard",)
    ),
    "other parts": (
        lambda: (shutil.copytree(_folder(2), "moved"), _remove(2), _folder(2).mkdir(),
                 shutil.move("moved", _folder(2) / "train")), 1,
        ("have the parts no part and train",),
    ),
    "a missing file": (
        lambda: (_folder(0) / "records-00000.tfrecord").unlink(), 1,
        ("records-00000.tfrecord: missing",),
    ),
    "a cut file": (
        lambda: _cut(_folder(2) / "records-00000.tfrecord"), 1, ("records-00000.tfrecord: ",)
    ),
    "a file more": (
        lambda: shutil.copy(_folder(2) / "records-00000.tfrecord", _folder(2) / "x.tfrecord"), 1,
        ("x.tfrecord: is not one of",),
    ),
    "no folder": (lambda: shutil.rmtree("shards"), 2, ("shards: is not a folder",)),
    "nothing": (lambda: _remove(0, 1, 2), 2, ("shards: holds no shard",)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_merging_is_refused(name: str, shards: Path, gptj):
    change, code, words = FAULTS[name]
    change()
    _refused(gptj("data", "merge", "shards", "--out", "merged"), code, *words)
    assert [p.name for p in Path().glob("merged*")] == []


def test_places_of_malformed_documents_are_bounded():
    parts = [Counts(skipped=80, places=[f"{name}:{n}" for n in range(80)]) for name in "ab"]
    total = add_up(parts)
    assert total.skipped == 160
    assert total.places == [*parts[0].places, *parts[1].places[:20]]


def test_merging_into_a_shard_or_a_whole_set(shards: Path, gptj):
    done = gptj("data", "merge", "shards", "--out", _folder(1) / "x")
    _refused(done, 2, "lies inside the source")
    _refused(gptj("data", "merge", "shards", "--out", "shards", "--force"), 2, "holds the source")
    assert gptj("data", "merge", "shards", "--out", "merged").code == 0
    _refused(gptj("data", "merge", "merged", "--out", "x"), 1, "joined already")


def test_links_that_are_impossible(shards: Path, gptj, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    _refused(gptj("data", "merge", "shards", "--out", "merged"), 1, "cross-device", "--copy")
    assert [p.name for p in Path().glob("merged*")] == []
    assert gptj("data", "merge", "shards", "--out", "merged", "--copy").code == 0


def test_a_merge_that_is_stopped_leaves_no_output(shards: Path, gptj, monkeypatch):
    count = iter(range(9))

    def stop(path: Path, new: Path) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        os.link(path, new)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "_link", stop)
        assert gptj("data", "merge", "shards", "--out", "merged").code == 130
    assert [p.name for p in Path().glob("merged*")] == []
    program = (
        "import os, signal, sys; from runner.data import merge; "
        "merge.write_params = lambda *a: os.kill(os.getpid(), signal.SIGKILL); "
        "from runner.cli.root import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "data", "merge", "shards", "--out", "merged"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == -signal.SIGKILL
    assert not Path("merged").exists()
    assert gptj("data", "merge", "shards", "--out", "merged").code == 0
    assert [p.name for p in Path().glob("merged*")] == ["merged"]
    assert gptj("data", "inspect", "merged", "--samples", "0").code == 0


def test_hdf5(data, gptj):
    Path("a.jsonl").write_bytes(_lines(20))
    assert data("pile", "a.jsonl", "--format", "hdf5", "--out", "whole").code == 0
    for n in range(2):
        options = ("--format", "hdf5", "--shard", f"{n}/2", "--out", "shards")
        assert data("pile", "a.jsonl", *options).code == 0
    assert gptj("data", "merge", "shards", "--out", "merged").code == 0
    done = gptj("data", "inspect", "merged", "--json")
    assert list(done.json["files"]) == ["records-00000.h5", "records-00001.h5"]
    blocks = [b for p in sorted(Path("merged").glob("*.h5")) for b in read_blocks(p)]
    assert sum(map(len, blocks)) == done.json["examples"]


def test_training_reads_merged_records_as_any_other(shards: Path, gptj):
    """Losses are those of a folder that holds the records in the order of the shards."""
    with pytest.raises(UsageError) as refused:
        find_records(["shards"])
    assert refused.value.hint == "join the shards with `gptj data merge shards --out data`"
    assert gptj("data", "merge", "shards", "--out", "merged").code == 0
    Path("plain").mkdir()
    paths = [p for n in range(3) for p in sorted(_folder(n).glob("*.tfrecord"))]
    for n, path in enumerate(paths):
        shutil.copy(path, f"plain/{n:03d}.tfrecord")
    make_checkpoint(Path("hf"), vocab_size=len(VOCAB), n_positions=32)
    assert gptj("convert", "hf", "--to", "tf", "--quiet").code == 0
    settings = ("train_input.batch_size=2", "optimizer.grad_accum_steps=1",
                "runconfig.log_step_count_steps=1")  # fmt: skip
    losses: list[list[float]] = []
    for name in ("merged", "plain"):
        values = (*settings, f"train_input.data_dir={name}")
        words = [word for value in values for word in ("--set", value)]
        run = ("--model-dir", f"run-{name}", "--max-steps", 4, "--quiet")
        done = gptj("train", "--init-from", "converted", *run, *words)
        assert done.code == 0, done.stderr
        rows = map(json.loads, Path(f"run-{name}/metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    stated = json.loads(Path("run-merged/records.json").read_text())["train_input"]
    assert stated.keys() == {p.name for p in Path("merged").glob("*.tfrecord")}
    assert all(text.startswith("sha256:") for text in stated.values())


# The commands of docs/data.md


@pytest.fixture
def reader(workdir: Path) -> Path:
    """The folder of a reader of the page."""
    for name in ("gpt-j-6b", "pile"):
        Path(name).mkdir()
    write_vocabulary(Path("gpt-j-6b"))
    Path("pile/a.jsonl").write_bytes(_lines(80))
    return workdir


def _block(language: str) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(found) == 1
    return found[0]


def _all_there(gptj) -> None:
    assert gptj("data", "merge", "shards", "--out", "data").code == 0
    assert sum(_documents("data").values()) == 80


@pytest.mark.parametrize("stated", [True, False], ids=["the number is stated", "it is not"])
def test_the_array_of_the_page(stated: bool, reader: Path, gptj, monkeypatch):
    script = _block("bash")
    low, high = map(int, re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", script, re.MULTILINE)[0])
    (line,) = re.findall(r"^gptj (.*)$", script, re.MULTILINE)
    words = shlex.split(line if stated else line.replace("--shard /16 ", ""))
    for n in range(low, high + 1):
        for name, value in _array(n, low, high, high - low + 1).items():
            monkeypatch.setenv(name, value)
        assert gptj(*words, "--processes", 1).code == 0
    _all_there(gptj)


def test_the_job_of_the_page(reader: Path, gptj, monkeypatch):
    spec = YAML(typ="safe").load(_block("yaml"))["spec"]
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    program, *words = [w.replace(f"{mount['mountPath']}/", "") for w in container["command"]]
    assert program == "gptj"
    for n in range(spec["completions"]):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(n))
        assert gptj(*words, "--processes", 1).code == 0
    _all_there(gptj)


def _statements(text: str) -> Iterator[ast.stmt]:
    """Yield what a program defines, without datatrove, which need not be installed."""
    for statement in ast.parse(text).body:
        is_datatrove = isinstance(statement, ast.ImportFrom) and "datatrove" in str(
            statement.module
        )
        if not is_datatrove and not isinstance(statement, ast.If):
            yield statement


def test_the_function_of_the_page(reader: Path, gptj):
    text = _block("python").replace("--processes 2", "--processes 1")
    names: dict[str, Any] = {}
    exec(compile(ast.Module([*_statements(text)], []), "page", "exec"), names)
    calls: list[list[str]] = []
    names["subprocess"] = SimpleNamespace(run=lambda words, check: calls.append(words))
    (tasks,) = map(int, re.findall(r"tasks=(\d+)", text))
    for rank in range(tasks):
        names["make_shard"](None, rank, tasks)
    for program, *words in calls:
        assert program == "gptj"
        assert gptj(*words).code == 0
    _all_there(gptj)


@pytest.mark.full
def test_the_executor_of_the_page(reader: Path, gptj):
    pytest.importorskip("datatrove")
    Path("shards.py").write_text(_block("python"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "shards.py"], env=environment, check=True)
    _all_there(gptj)
