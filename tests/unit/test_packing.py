"""Packing: every token of the text is in the records once, in order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.layouts.gpt2_tokenizer import EXTRA_TOKENS, write_tokenizer
from gptj_convert.streams.progress import finish
from gptj_model.config import END_OF_TEXT_ID, VOCAB_SIZE
from gptj_model.errors import DataFault
from runner.data.making import pieces
from runner.data.making.build import Counts, Options, build
from runner.data.making.packing import Packer
from runner.data.making.sources import Part
from runner.data.making.text import TextOptions, TextRecipe
from runner.data.making.tokenizer import load_tokenizer, may_cut
from runner.data.reading.example import FEATURES, parse, serialize
from runner.data.reading.records import check_records, find_records, read_records

SIZES = st.integers(1, 40)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path):
    return load_tokenizer(tokenizer_folder)


def _examples(folder: Path) -> list[dict[str, np.ndarray]]:
    spec = {name: tf.io.VarLenFeature(tf.int64) for name in FEATURES}
    examples = []
    for path in find_records([str(folder)]):
        for raw in tf.data.TFRecordDataset(str(path)):
            parsed = tf.io.parse_single_example(raw, spec)
            examples.append({n: tf.sparse.to_dense(v).numpy() for n, v in parsed.items()})
    return examples


def _pack(paths: Sequence[Path], folder: Path, out: Path, length: int, **fields: Any) -> Counts:
    options = TextOptions(tokenizer=folder)
    recipe = TextRecipe(options=options, length=length, whole_files=True, **fields)
    return finish(build([Part(files=tuple(paths))], recipe, out, Options())).counts[""]


def _tokens(examples: list[dict[str, np.ndarray]], length: int) -> list[int]:
    """Return the stream that examples hold."""
    found: list[int] = []
    for e in examples:
        assert all(len(e[name]) == length for name in FEATURES)
        assert np.array_equal(e["input_ids"][1:], e["labels"][:-1])
        real = int(e["input_mask"].sum())
        assert np.array_equal(e["input_mask"], np.arange(length) < real)
        found += [int(e["input_ids"][0]), *map(int, e["labels"][:real])]
    return found


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1),
    length=SIZES,
)
def test_the_text_can_be_put_together_again(
    texts: list[str], length: int, tokenizer, tokenizer_folder: Path
):
    expected = [i for t in texts for i in [*tokenizer.encode(t).ids, END_OF_TEXT_ID]]
    with TemporaryDirectory() as folder:
        paths = []
        for n, text in enumerate(texts):
            paths.append(Path(folder) / f"{n}.txt")
            paths[-1].write_bytes(text.encode())
        counts = _pack(paths, tokenizer_folder, Path(folder) / "out", length)
        examples = _examples(Path(folder) / "out")
        check_records(find_records([f"{folder}/out"]), length=length, vocab_size=VOCAB_SIZE)
    assert _tokens(examples, length) == expected
    assert counts.tokens == len(expected)
    assert counts.documents == len(texts)
    assert counts.examples == len(examples)


@given(tokens=st.lists(st.integers(0, 50399)), length=SIZES, parts=st.integers(1, 5), seed=SIZES)
def test_shortened_sequences_lose_nothing_either(
    tokens: list[int], length: int, parts: int, seed: int
):
    """The records do not depend on how the stream arrives, or on where a run resumes."""
    stream = np.asarray(tokens, np.int32)

    def make(packer: Packer) -> None:
        for part in np.array_split(stream[int(sum(map(len, used))) :], parts):
            packer.add(part)
            while len(block := packer.cut(2)):
                blocks.append(block)
        blocks.append(packer.finish())

    used: list[list[int]] = []
    blocks: list[np.ndarray] = []
    options: dict[str, Any] = {"short_seq_prob": 0.5, "seed": seed}
    make(Packer(length, END_OF_TEXT_ID, **options))
    whole = np.concatenate(blocks)
    rows = [dict(zip(FEATURES, e, strict=True)) for e in whole]
    assert _tokens(rows, length) == tokens
    if len(whole) > 1:
        first = rows[0]
        used.append([0] * (1 + int(first["input_mask"].sum())))
        blocks = [whole[:1]]
        make(Packer(length, END_OF_TEXT_ID, made=1, **options))
        assert np.array_equal(np.concatenate(blocks), whole)


def _stream(count: int) -> np.ndarray:
    return np.arange(100, 100 + count, dtype=np.int32)


def test_a_stream_is_cut_into_sequences_that_do_not_overlap():
    packer = Packer(3, END_OF_TEXT_ID)
    packer.add(_stream(6))
    packer.add(_stream(5))
    assert packer.cut(0).shape == (0, 3, 3)
    first = packer.cut(1)
    assert first.dtype == np.int32
    assert first.tolist() == [[[100, 101, 102], [1, 1, 1], [101, 102, 103]]]
    assert packer.left == 7
    assert packer.cut(9).tolist() == [[[104, 105, 100], [1, 1, 1], [105, 100, 101]]]
    assert packer.left == 3
    last = packer.finish()
    assert last.dtype == np.int32
    pad = END_OF_TEXT_ID
    assert last.tolist() == [[[102, 103, 104], [1, 1, 0], [103, 104, pad]]]
    assert (packer.left, packer.finish().shape) == (0, (0, 3, 3))


def test_the_last_sequence_may_be_left_out():
    packer = Packer(3, END_OF_TEXT_ID, keep_all=False)
    packer.add(_stream(5))
    assert len(packer.cut(5)) == 1
    nothing = packer.finish()
    assert (nothing.shape, nothing.dtype) == ((0, 3, 3), np.int32)


def _sizes(length: int, count: int, **options: Any) -> list[int]:
    """Return the tokens of each sequence of a shortened stream."""
    packer = Packer(length, END_OF_TEXT_ID, **options)
    packer.add(_stream(count))
    sizes = []
    while len(block := packer.cut(1)):
        sizes.append(1 + int(block[0, 1].sum()))
    return sizes


def test_what_a_shortened_sequence_cuts_off_may_be_left_out():
    """As in the reference, the next sequence begins where a whole one would have ended."""
    packer = Packer(9, END_OF_TEXT_ID, short_seq_prob=0.5, keep_all=False)
    packer.add(_stream(2000))
    begins, sizes = [], []
    while len(block := packer.cut(1)):
        begins.append(int(block[0, 0, 0]))
        sizes.append(1 + int(block[0, 1].sum()))
    assert begins == [int(_stream(2000)[10 * n]) for n in range(200)]
    assert sizes == _sizes(9, 2000, short_seq_prob=0.5)[:200]


def test_shortened_sequences_are_drawn_by_seed_and_number():
    sizes = _sizes(9, 2000, short_seq_prob=0.5)
    assert set(sizes) == set(range(2, 11))
    assert 0.3 < sizes.count(10) / len(sizes) < 0.7
    assert _sizes(9, 2000, short_seq_prob=0.5, seed=0) == sizes
    assert _sizes(9, 2000, short_seq_prob=0.5, seed=1) != sizes
    for made in (1, 2, 7):
        assert _sizes(9, sum(sizes[made:]), short_seq_prob=0.5, made=made) == sizes[made:]
    assert _sizes(2, 40, short_seq_prob=1.0) == [2] * 20
    assert _sizes(1, 40, short_seq_prob=1.0) == [2] * 20


def test_a_shortened_sequence_that_just_fits_is_cut():
    packer = Packer(2, END_OF_TEXT_ID, short_seq_prob=1.0)
    packer.add(_stream(2))
    assert len(packer.cut(0)) == 0
    assert len(packer.cut(1)) == 1
    assert packer.left == 0


BLOCKS = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        st.tuples(*[st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n)] * 3), min_size=1
    )
)


@settings(deadline=None)
@given(BLOCKS)
@example([([5, 300], [1, 0], [300, 70000]), ([300, 7], [1, 1], [7, 2])])  # as packed text
@example([([0], [127], [128]), ([16383], [16384], [2**31 - 1])])
@example([([0, 127], [128, 16383], [16384, 65535]), ([2**14, 2], [1, 0], [2, 2**16 - 1])])
def test_examples_are_the_bytes_that_protobuf_writes(rows: list[tuple[list[int], ...]]):
    def expected(row: tuple[list[int], ...]) -> bytes:
        lists = zip(FEATURES, (tf.train.Int64List(value=v) for v in row), strict=True)
        feature = {name: tf.train.Feature(int64_list=values) for name, values in lists}
        message = tf.train.Example(features=tf.train.Features(feature=feature))
        return message.SerializeToString(deterministic=True)

    found = list(serialize(np.asarray(rows, np.int32)))
    assert found == [expected(row) for row in rows]
    assert {k: v.tolist() for k, v in parse(found[0]).items()} == dict(
        zip(FEATURES, rows[0], strict=True)
    )


WORDS = st.sampled_from(
    [
        "a",
        "don't",
        " ",
        "\n",
        "\t",
        "é",
        "漢字",
        "。",
        "12",
        "'s",
        "\x1c",
        "\u00a0",
        "<|",
        "🦜",
        "_",
    ]
)


@settings(max_examples=300)
@given(text=st.lists(WORDS, max_size=60).map("".join), size=st.integers(1, 9))
def test_pieces_have_the_tokens_of_the_whole(text: str, size: int, tokenizer):
    cut = list(pieces.pieces((text[at : at + 3] for at in range(0, len(text), 3)), size))
    assert "".join(cut) == text
    assert [i for piece in cut for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def test_only_gpt2s_splitting_may_be_cut(tokenizer, tokenizer_folder: Path):
    assert may_cut(tokenizer.to_str())
    other = load_tokenizer(tokenizer_folder)
    other.add_tokens(["two words"])
    assert not may_cut(other.to_str())


def test_the_vocabulary_is_gpt_js(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.encode("The dog").ids == [464, 3290]
    assert tokenizer.token_to_id(EXTRA_TOKENS[-1]) == VOCAB_SIZE - 1
    assert tokenizer.decode(tokenizer.encode("naïve 🦜\n\ttabs").ids) == "naïve 🦜\n\ttabs"


def test_vocabulary_and_merges_will_do(tokenizer, tokenizer_folder: Path, tmp_path: Path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    text = "naïve 🦜 <|endoftext|>"
    assert load_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


def test_the_name_of_a_special_token_in_a_text_is_text(tokenizer):
    assert END_OF_TEXT_ID not in tokenizer.encode("a <|endoftext|> b").ids


@pytest.fixture
def record_file(tmp_path: Path, tokenizer_folder: Path) -> Path:
    (tmp_path / "text.txt").write_text("some text " * 100)
    _pack([tmp_path / "text.txt"], tokenizer_folder, tmp_path / "out", 16)
    return find_records([str(tmp_path / "out")])[0]


def test_tensorflow_reads_what_we_wrote(record_file: Path):
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
