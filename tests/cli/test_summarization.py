"""`gptj data summarization`: the reference's rules, from its .bin files, lines and tables."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from runner.data.making.tokenizer import load_tokenizer
from runner.data.reading.example import FEATURES

PAIRS = [
    ("The quick brown fox jumps over the lazy dog.", "A fox jumps."),
    ("", "no article"),
    ("no abstract", ""),
    ("short", "an abstract that is far longer than its article"),
    ("word " * 60, "too long"),
    ("Café 🦜 opens in the city today, says its owner.", "Café opens 🦜."),
]
LENGTH = 32
END, SEPARATOR = 50256, 50257


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def data(gptj, workdir: Path, tokenizer_folder: Path):
    def call(*arguments: object):
        common = ("--tokenizer", tokenizer_folder, "--max-sequence-length", LENGTH)
        return gptj("data", "summarization", *arguments, *common, "--processes", 1, "--json")

    return call


@pytest.fixture
def expected(tokenizer_folder: Path):
    """Return the three lists of a pair, by the documented rule."""
    tokenizer = load_tokenizer(tokenizer_folder)

    def lists(article: str, abstract: str, cut: int | None = None) -> list[list[int]]:
        a, s = tokenizer.encode(article).ids[:cut], tokenizer.encode(abstract).ids
        ids, labels = [END, *a, SEPARATOR, *s], [*a, END, *s, END]
        mask = [0] * (len(a) + 1) + [1] * (len(s) + 1)
        rest = LENGTH - len(ids)
        return [ids + [END] * rest, mask + [0] * rest, labels + [END] * rest]

    return lists


def _binary(pairs: Sequence[tuple[str, str]]) -> bytes:
    records = b""
    for article, abstract in pairs:
        feature = {
            name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
            for name, text in (("article", article), ("abstract", abstract))
        }
        data = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
        records += struct.pack("<q", len(data)) + data
    return records


def _rows(folder: str) -> list[list[list[int]]]:
    found = []
    for path in sorted(Path(folder).glob("*.tfrecord")):
        for raw in tf.data.TFRecordDataset(str(path)):
            feature = tf.train.Example.FromString(raw.numpy()).features.feature
            found.append([list(feature[name].int64_list.value) for name in FEATURES])
    return found


WRITERS = {
    "a.bin": lambda p: p.write_bytes(_binary(PAIRS)),
    "a.jsonl": lambda p: p.write_text(
        "".join(json.dumps({"article": a, "highlights": s}) + "\n" for a, s in PAIRS)
    ),
    "a.parquet": lambda p: pq.write_table(
        pa.table({"article": [a for a, _ in PAIRS], "summary": [s for _, s in PAIRS]}), p
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_rule(name: str, data, expected):
    WRITERS[name](Path(name))
    done = data(name)
    assert done.code == 0, done.stderr
    assert _rows("data") == [expected(*PAIRS[0]), expected(*PAIRS[5])]
    assert done.json["documents"] == 6
    assert done.json["left_out"] == {
        "with an empty side": 2,
        "with an abstract longer than the article": 1,
        "too long": 1,
    }


def test_an_article_may_be_shortened(data, expected):
    Path("a.bin").write_bytes(_binary(PAIRS[4:5]))
    assert data("a.bin", "--truncate-article").code == 0
    assert _rows("data") == [expected(*PAIRS[4], cut=LENGTH - 2 - 2)]


def test_a_test_set_is_taken_whole_or_refused(data, expected):
    Path("test.bin").write_bytes(_binary([p for p in PAIRS if p != PAIRS[4]]))
    assert data("test.bin").code == 0
    assert _rows("data") == [expected(*p) for p in PAIRS if p != PAIRS[4]]
    Path("test.bin").write_bytes(_binary(PAIRS))
    done = data("test.bin", "--out", "other", "--truncate-article")
    assert done.code == 1
    assert "test.bin:4: needs " in done.stderr
    assert "hint: set --max-sequence-length" in done.stderr


GOOD = _binary(PAIRS[:1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (struct.pack("<q", -1), "claims -1 bytes"),
        (struct.pack("<q", 2**60), f"claims {2**60} bytes"),
        (GOOD[:-3], "the file ends inside it, 3 bytes short"),
        (GOOD[:5], "the file ends inside its length"),
    ],
    ids=["negative", "huge", "cut", "cut in the length"],
)
def test_a_damaged_binary_file(damage: bytes, words: str, data):
    Path("a.bin").write_bytes(GOOD + damage)
    done = data("a.bin")
    assert done.code == 1
    assert f"a.bin: record 1 at byte {len(GOOD)}: {words}" in done.stderr
    done = data("a.bin", "--on-error", "skip")
    assert (done.json["documents"], done.json["skipped"]) == (1, 1)


def test_a_record_that_is_no_example(data):
    Path("a.bin").write_bytes(GOOD + struct.pack("<q", 4) + b"\xff\xff\xff\xff")
    assert "a.bin:1: is not a tf.train.Example" in data("a.bin").stderr
    Path("b.jsonl").write_text('{"article": "a", "highlights": null}\n')
    assert "b.jsonl:1: abstract or highlights or summary is null" in data("b.jsonl").stderr


def test_lengths_are_compared_in_tokens_or_in_bytes(data, tokenizer_folder: Path):
    """One emoji is several tokens, a common word with as many bytes is one."""
    dense, plain = "🦜🦜", "international news"
    tokenizer = load_tokenizer(tokenizer_folder)
    assert len(tokenizer.encode(dense).ids) > len(tokenizer.encode(plain).ids)
    assert len(dense.encode()) < len(plain.encode())
    Path("pairs.bin").write_bytes(_binary([(plain, dense), (dense, plain)]))
    by_tokens, by_bytes = data("pairs.bin", "--out", "a"), data("pairs.bin", "--out", "b",
                                                                "--compare-bytes")  # fmt: skip
    first, second = (_ids(folder) for folder in ("a", "b"))
    assert by_tokens.code == by_bytes.code == 0
    assert len(first) == len(second) == 1
    assert first[0][1] == tokenizer.encode(dense).ids[0]
    assert second[0][1] == tokenizer.encode(plain).ids[0]


def test_longer_abstracts_are_counted_or_kept(data):
    Path("pairs.bin").write_bytes(_binary([("one", "two three four"), ("one two", "three")]))
    done = data("pairs.bin", "--out", "a")
    assert done.json["left_out"] == {"with an abstract longer than the article": 1}
    assert "1 with an abstract longer than the article" in done.stderr
    done = data("pairs.bin", "--out", "b", "--allow-longer-abstracts")
    assert (done.json["left_out"], len(_ids("b"))) == ({}, 2)
    done = data("pairs.bin", "--out", "c", "--allow-longer-abstracts", "--compare-bytes")
    assert done.code == 2


def test_missing_keys_are_named(data):
    Path("a.jsonl").write_text('{"text": "a", "summary": "b"}\n')
    done = data("a.jsonl")
    assert done.code == 1
    assert "a.jsonl:1: has no article, found 'text', 'summary'" in done.stderr
    assert "hint: name the keys with --article-column" in done.stderr


def _ids(folder: str) -> list[list[int]]:
    spec = {FEATURES[0]: tf.io.VarLenFeature(tf.int64)}
    paths = [str(p) for p in Path(folder).glob("*.tfrecord")]
    return [
        tf.sparse.to_dense(tf.io.parse_single_example(raw, spec)[FEATURES[0]]).numpy().tolist()
        for raw in tf.data.TFRecordDataset(paths)
    ]
