"""Packing: every token of the text is in the records once, in order."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_convert.tokenizer import EXTRA_TOKENS, write_tokenizer
from gptj_model.config import END_OF_TEXT_ID, VOCAB_SIZE
from gptj_model.errors import DataFault
from runner.data.records import FEATURES, check_records, find_records, read_records
from runner.data.text import Counts, find_texts, load_tokenizer, pack


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def _examples(folder: Path) -> list[dict[str, np.ndarray]]:
    spec = {name: tf.io.VarLenFeature(tf.int64) for name in FEATURES}
    examples = []
    for path in find_records([str(folder)]):
        for raw in tf.data.TFRecordDataset(str(path)):
            parsed = tf.io.parse_single_example(raw, spec)
            examples.append({n: tf.sparse.to_dense(v).numpy() for n, v in parsed.items()})
    return examples


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1),
    length=st.integers(1, 40),
)
def test_the_text_can_be_put_together_again(texts: list[str], length: int, tokenizer):
    expected = [i for t in texts for i in [*tokenizer.encode(t).ids, END_OF_TEXT_ID]]
    counts = Counts()
    with TemporaryDirectory() as folder:
        paths = []
        for n, text in enumerate(texts):
            paths.append(Path(folder) / f"{n}.txt")
            paths[-1].write_bytes(text.encode())
        for _ in pack(paths, tokenizer, Path(folder) / "out", counts, length=length):
            pass
        examples = _examples(Path(folder) / "out")
        check_records(find_records([f"{folder}/out"]), length=length, vocab_size=VOCAB_SIZE)

    found: list[int] = []
    for e in examples:
        assert all(len(e[name]) == length for name in FEATURES)
        assert np.array_equal(e["input_ids"][1:], e["labels"][:-1])
        real = int(e["input_mask"].sum())
        assert np.array_equal(e["input_mask"], np.arange(length) < real)
        found += [int(e["input_ids"][0]), *map(int, e["labels"][:real])]
    assert found == expected
    assert counts.tokens == len(expected)
    assert counts.documents == len(texts)
    assert counts.examples == len(examples)


def test_the_vocabulary_is_gpt_js(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.encode("The dog").ids == [464, 3290]
    assert tokenizer.token_to_id(EXTRA_TOKENS[-1]) == VOCAB_SIZE - 1
    assert tokenizer.decode(tokenizer.encode("naïve 🦜\n\ttabs").ids) == "naïve 🦜\n\ttabs"


def test_the_name_of_a_special_token_in_a_text_is_text(tokenizer):
    assert END_OF_TEXT_ID not in tokenizer.encode("a <|endoftext|> b").ids


def test_a_text_that_is_not_utf8_stops_with_file_and_line(tmp_path: Path, tokenizer):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"one\ntwo\nth\xffree\n")
    with pytest.raises(DataFault, match=r"bad\.txt:3: byte 0xff at 10"):
        list(pack([bad], tokenizer, tmp_path / "out", Counts(), length=8))
    assert not (tmp_path / "out").exists()


def test_or_is_skipped_and_counted(tmp_path: Path, tokenizer):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "good.txt").write_text("good")
    counts = Counts()
    texts = find_texts([tmp_path], ["*.txt"])
    for _ in pack(texts, tokenizer, tmp_path / "out", counts, length=8, skip_bad=True):
        pass
    assert (counts.documents, counts.skipped) == (1, 1)


def test_folders_are_searched_by_pattern_and_sorted(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for name in ("b.py", "a.py", "c.txt", "sub/d.py"):
        (tmp_path / name).write_text(name)
    found = find_texts([tmp_path], ["*.py"])
    assert [p.name for p in found] == ["a.py", "b.py", "d.py"]
    with pytest.raises(DataFault, match=r"\*\.md"):
        find_texts([tmp_path], ["*.md"])


@pytest.fixture
def record_file(tmp_path: Path, tokenizer) -> Path:
    (tmp_path / "text.txt").write_text("some text " * 100)
    for _ in pack([tmp_path / "text.txt"], tokenizer, tmp_path / "out", Counts(), length=16):
        pass
    return find_records([str(tmp_path / "out")])[0]


def test_our_reader_reads_what_tensorflow_wrote(record_file: Path):
    ours = [data for _, _, data in read_records(record_file, max_bytes=1 << 20)]
    assert ours == [raw.numpy() for raw in tf.data.TFRecordDataset(str(record_file))]


def test_every_flipped_byte_is_found_with_its_record(record_file: Path):
    raw = record_file.read_bytes()
    offsets = [o for _, o, _ in read_records(record_file, max_bytes=1 << 20)]
    for at in range(0, len(raw), 7):
        damaged = bytearray(raw)
        damaged[at] ^= 0x10
        record_file.write_bytes(damaged)
        record = sum(o <= at for o in offsets) - 1
        with pytest.raises(DataFault, match=rf"record {record} at byte {offsets[record]}\b"):
            list(read_records(record_file, max_bytes=1 << 20))


def test_a_cut_inside_a_record_is_found(record_file: Path):
    record_file.write_bytes(record_file.read_bytes()[:-3])
    with pytest.raises(DataFault, match="ends inside it"):
        list(read_records(record_file, max_bytes=1 << 20))
