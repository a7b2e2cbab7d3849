"""`gptj data inspect`: figures of records, and the place of whatever is wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from runner.data.making.tokenizer import load_tokenizer
from runner.data.reading.records import read_records
from tests.conftest import write_records
from tests.unit.test_input_fn import write_text_records

LENGTH, END, SEPARATOR = 48, 50256, 50257
PAIRS = [(f"Town {n} met <b>today</b> and decided much. " * 2, f"Town {n}.") for n in range(9)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def made(gptj, workdir: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """Make records of `PAIRS` in ./data, two files."""

    def call(*options: object) -> Path:
        lines = [json.dumps({"article": a, "summary": s}) for a, s in PAIRS]
        Path("a.jsonl").write_text("\n".join(lines))
        how = ("--tokenizer", tokenizer_folder, "--max-sequence-length", LENGTH, "--processes", 1)
        done = gptj("data", "summarization", "a.jsonl", *how, "--files-per-record", 5, *options)
        assert done.code == 0, done.stderr
        return Path("data")

    return call


@pytest.mark.parametrize("options", [(), ("--gzip",), ("--format", "hdf5")])
def test_figures(options: tuple, made, gptj, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = [[tokenizer.encode(text).ids for text in pair] for pair in PAIRS]
    found = gptj("data", "inspect", made(*options), "--json").json
    assert list(found["files"].values()) == [5, 4]
    assert (found["examples"], found["max_sequence_length"]) == (9, LENGTH)
    lengths = [len(a) + len(s) + 2 for a, s in rows]
    assert found["padding_share"] == pytest.approx(1 - sum(lengths) / 9 / LENGTH)
    assert found["counted_share"] == pytest.approx(sum(len(s) + 1 for _, s in rows) / 9 / LENGTH)
    for bar in found["lengths"]:
        assert bar["examples"] == sum(bar["from"] <= n <= bar["to"] for n in lengths)
    ids = [i for a, s in rows for i in (END, *a, SEPARATOR, *s)]
    assert found["distinct_ids"] == len(set(ids))
    for row in found["most_frequent"]:
        assert row["count"] == ids.count(row["id"])
    assert found["arguments"]["kind"] == "summarization"


def test_what_is_shown(made, gptj, tokenizer_folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = gptj("data", "inspect", made(), "--tokenizer", tokenizer_folder, "--html", "a.html")
    assert done.code == 0, done.stderr
    assert "\x1b[2mTown" in done.stdout
    assert "\x1b[32mTown" in done.stdout
    page = Path("a.html").read_text()
    assert "&lt;b&gt;today" in page
    assert "<mark>Town" in page
    assert "http" not in page


def test_folders_of_records(made, gptj):
    shutil.copytree(made(), "both/train")
    shutil.copytree("data", "both/val")
    assert gptj("data", "inspect", "both", "--json").json["parts"].keys() == {"train", "val"}
    Path("empty").mkdir()
    done = gptj("data", "inspect", "empty")
    assert done.code == 2
    assert "empty: holds neither *.tfrecord* nor *.h5" in done.stderr


def test_records_of_the_original_trainer(workdir: Path, gptj):
    (workdir / "set").mkdir()
    write_text_records(workdir / "set/a.tfrecords", [[1, 2, 3], [4, 5, 6]])
    (workdir / "set.index").write_text("set/a.tfrecords\n")
    for place in ("set", "set.index"):
        done = gptj("data", "inspect", place, "--json")
        assert done.code == 0, done.stderr
        assert (done.json["examples"], done.json["max_sequence_length"]) == (2, 2)
        assert done.json["counted_share"] == 1
    assert "⟦5 6⟧" in gptj("data", "inspect", "set.index").stdout


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_of_a_tfrecord(made, gptj):
    path = made() / "records-00001.tfrecord"
    offset = [o for _, o, _ in read_records(path, max_bytes=1 << 20)][2]
    _flip(path, offset + 40)
    done = gptj("data", "inspect", "data", "--json")
    assert done.code == 1
    assert f"records-00001.tfrecord: record 2 at byte {offset}: the checksum" in done.stderr


def test_a_changed_value_of_hdf5(made, gptj):
    path = made("--format", "hdf5") / "records-00001.h5"
    with h5py.File(path, "r+") as file:
        offset = file["data"].id.get_chunk_info_by_coord((1, 0, 0)).byte_offset
        good = int(file["data"][1, 0, 4])
        file["data"][1, 0, 4] = 60_000
    done = gptj("data", "inspect", "data")
    assert done.code == 1
    assert f"records-00001.h5: record 1 at byte {offset}: input_ids holds 60000" in done.stderr
    with h5py.File(path, "r+") as file:
        file["data"][1, 0, 4] = good + 1
    done = gptj("data", "inspect", "data")
    assert done.code == 1
    assert "records-00001.h5: holds 4 valid examples, but differs" in done.stderr


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, 2], [1, 2], [1, 2]], "input_mask holds 2, expected 0 to 1"),
        ([[1, 2], [1, 1], [1]], "labels has 1 tokens, expected max_sequence_length = 2"),
        ([[1, -2], [1, 1], [1, 2]], "input_ids holds -2, expected 0 to 50399"),
    ],
)
def test_records_of_others(rows: list, words: str, workdir: Path, gptj):
    good = [[1, 2], [1, 1], [2, 3]]
    write_records(workdir / "a.tfrecord", [good, good])
    assert gptj("data", "inspect", ".", "--json").json["examples"] == 2
    write_records(workdir / "a.tfrecord", [good, rows])
    done = gptj("data", "inspect", ".")
    assert done.code == 1
    assert "a.tfrecord: record 1 at byte " in done.stderr
    assert words in done.stderr
