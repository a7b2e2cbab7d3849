"""Records into batches: which, in what order, on which worker, and from where."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.containers.protobuf import encode_field
from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from gptj_model.errors import DataFault, UsageError
from runner.config.params import InputParams
from runner.data.making.build import Options, build
from runner.data.making.sources import Part
from runner.data.making.text import TextOptions, TextRecipe
from runner.data.reading.example import FEATURES, parse, parse_together, serialize
from runner.data.reading.input_fn import ALL_ROWS, Batches, batches
from runner.data.reading.order import shuffle
from runner.data.reading.place import Place, place_after
from runner.data.reading.records import count_records, read_records
from tests.conftest import write_records

LENGTH, VOCAB = 4, 50400
#: Records of each file; a record's ids are its number.
SIZES = (5, 1, 7, 3, 6)


def _numbered() -> list[list[int]]:
    """The records of each file, numbered through."""
    ends = np.cumsum(SIZES)
    return [list(range(end - size, end)) for size, end in zip(SIZES, ends, strict=True)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of such files, every second one compressed."""
    folder = tmp_path_factory.mktemp("records")
    mask = [1] * (LENGTH - 1) + [0]
    for n, numbers in enumerate(_numbered()):
        options = tf.io.TFRecordOptions(compression_type="GZIP" if n % 2 else "")
        rows = [([i] * LENGTH, mask, [i + 1] * LENGTH) for i in numbers]
        write_records(folder / f"{n}.tfrecord", rows, options=options)
    return folder


@pytest.fixture
def reading(records: Path) -> Callable[..., Batches]:
    def call(*, skip: int | Place = 0, rows: slice = ALL_ROWS, **fields: Any) -> Batches:
        values = {"data_dir": [str(records)], "max_sequence_length": LENGTH, "batch_size": 4}
        params = InputParams(**values | fields)
        start = place_after(params, skip) if isinstance(skip, int) and skip else skip or None
        return batches(params, vocab_size=VOCAB, training=True, start=start, rows=rows)

    return call


def _numbers(found: Batches, count: int | None = None) -> list[list[int]]:
    return [[int(i) for i in ids[:, 0]] for ids, _, _ in islice(found, count)]


def _interleaved(files: list[list[int]], width: int) -> list[int]:
    """One record of each open file in turns; where one ended, the next turn opens another."""
    waiting = [list(f) for f in files]
    places: list[list[int] | None] = [None] * width
    found, at = [], 0
    while waiting or any(places):
        if places[at] is None and waiting:
            places[at] = waiting.pop(0)
        if place := places[at]:
            found.append(place.pop(0))
        else:
            places[at] = None
        at = (at + 1) % width
    return found


@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_files_in_turns_and_no_partial_batch(width: int, reading):
    found = _numbers(reading(n_parallel_reads=width, shuffle=False, repeat=False))
    order = _interleaved(_numbered(), width)
    assert found == [order[at : at + 4] for at in range(0, 20, 4)]
    twice = _numbers(reading(n_parallel_reads=width, shuffle=False), 10)
    assert twice == found * 2


def _by_tf_data(folder: Path, params: InputParams, epoch: int) -> list[list[int]]:
    """The numbers of an epoch's batches, as the TensorFlow program reads them."""
    paths = sorted(folder.glob("*.tfrecord"))
    kinds = ["GZIP" if path.read_bytes()[:2] == b"\x1f\x8b" else "" for path in paths]

    def read(number: tf.Tensor) -> tf.data.Dataset:
        files = tf.data.Dataset.from_tensor_slices(([str(p) for p in paths], kinds))
        found = files.interleave(tf.data.TFRecordDataset, cycle_length=params.n_parallel_reads)
        if params.shuffle is not False:
            tf.compat.v1.set_random_seed(87654321)
            seed = params.effective_shuffle_seed + number * 1_000_003
            size = params.effective_shuffle_buffer
            found = found.shuffle(size, seed=seed, reshuffle_each_iteration=False)
        return found.batch(params.batch_size, drop_remainder=True)

    numbered = tf.data.Dataset.range(epoch, epoch + 1).flat_map(read)
    spec = {"input_ids": tf.io.FixedLenFeature([LENGTH], tf.int64)}
    return [tf.io.parse_example(b, spec)["input_ids"][:, 0].numpy().tolist() for b in numbered]


@given(
    width=st.integers(1, 7),
    shuffle=st.booleans(),
    buffer=st.integers(1, 30),
    seed=st.one_of(st.integers(0, 3), st.integers(0, 2**45)),
    size=st.integers(1, 9),
    epoch=st.one_of(st.integers(0, 2), st.integers(0, 2**30)),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_order_is_that_of_tf_data(
    width: int, shuffle: bool, buffer: int, seed: int, size: int, epoch: int, records: Path, reading
):
    fields: dict[str, Any] = {"n_parallel_reads": width, "shuffle": shuffle, "batch_size": size}
    fields |= {"shuffle_buffer": buffer, "shuffle_seed": seed}
    params = InputParams(data_dir=[str(records)], max_sequence_length=LENGTH, **fields)
    expected = _by_tf_data(records, params, epoch)
    assert _numbers(reading(skip=Place(epoch, 0), **fields), len(expected)) == expected


def test_a_long_shuffle_is_that_of_tf_data():
    def shuffled(number: tf.Tensor) -> tf.data.Dataset:
        tf.compat.v1.set_random_seed(87654321)
        rows = tf.data.Dataset.range(20_000)
        return rows.shuffle(3000, seed=number, reshuffle_each_iteration=False)

    expected = tf.data.Dataset.from_tensors(tf.constant(7, tf.int64)).flat_map(shuffled)
    assert list(shuffle(range(20_000), 3000, 7)) == [int(n) for n in expected]


def test_unusual_examples_are_read_as_others_are(tmp_path: Path, reading):
    """Lists in several parts and unpacked, unknown features, huge sizes of a number."""
    usual = [[n] * LENGTH for n in range(4)]
    write_records(tmp_path / "a.tfrecord", [(row, [1] * LENGTH, row) for row in usual])
    expected = next(reading(data_dir=[str(tmp_path)], shuffle=False))
    with tf.io.TFRecordWriter(str(tmp_path / "a.tfrecord")) as writer:
        for n, row in enumerate(usual):
            parts: dict[bytes, bytes] = {}
            for name, values in (("input_ids", row), ("input_mask", [1] * LENGTH), ("labels", row)):
                packed = encode_field(1, bytes(values))
                if n == 1:  # each number in two bytes, of which the second is empty
                    packed = encode_field(1, b"".join(bytes([v | 0x80, 0]) for v in values))
                if n == 2:
                    packed = b"".join(encode_field(1, v) for v in values)
                if n == 3:
                    packed = encode_field(1, bytes(values[:1])) + encode_field(1, bytes(values[1:]))
                parts[name.encode()] = encode_field(3, packed)
            if n == 0:
                parts[b"more"] = encode_field(1, encode_field(1, b"text"))
            entries = (encode_field(1, k) + encode_field(2, v) for k, v in parts.items())
            writer.write(encode_field(1, b"".join(encode_field(1, e) for e in entries)))
    found = next(reading(data_dir=[str(tmp_path)], shuffle=False))
    for ours, others in zip(found, expected, strict=True):
        assert np.array_equal(ours, others)


@given(
    top=st.sampled_from([3, 127, 128, 50400, 2**21, 2**28 - 1, 2**28, 2**31 - 1]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    packed=st.booleans(),
    seed=st.integers(0, 99),
    flip=st.none() | st.tuples(st.floats(0, 0.999), st.integers(0, 7)),
)
@settings(max_examples=200, deadline=None)
def test_records_together_are_those_one_by_one(
    top: int, shape: tuple[int, int], packed: bool, seed: int, flip: tuple[float, int] | None
):
    (count, length), random = shape, np.random.default_rng(seed)
    block = random.integers(0, top, (count, 3, length), np.int32, endpoint=True)
    if packed:
        block[:, 2, :-1] = block[:, 0, 1:]
    records = list(serialize(block))
    if flip:
        damaged = bytearray(records[-1])
        damaged[int(flip[0] * len(damaged))] ^= 1 << flip[1]
        records[-1] = bytes(damaged)
    found = parse_together(records, FEATURES)
    if found is None:
        assert flip or block.max() >= 2**28
        return
    for n, record in enumerate(records):
        expected = parse(record)
        assert all(np.array_equal(values[n], expected[name]) for name, values in found.items())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1, 2, 3], "record 3 at byte .*: input_ids has 3 tokens, expected max_sequence_length"),
        ([1, 2, 3, VOCAB], f"record 3 at byte .*: input_ids holds {VOCAB}, expected 0 to 50399"),
        ([1, 2, 3, -1], "record 3 at byte .*: input_ids holds -1, expected 0 to 50399"),
        ([1, 2, 3, 2**40], "record 3 at byte .*: input_ids holds 1099511627776"),
    ],
)
def test_a_bad_record_in_a_batch(row: list[int], words: str, tmp_path: Path, reading):
    rows = [([n] * LENGTH, [1] * LENGTH, [n] * LENGTH) for n in range(3)]
    write_records(tmp_path / "a.tfrecord", [*rows, (row, [1] * len(row), row)])
    with pytest.raises(DataFault, match=words):
        next(reading(data_dir=[str(tmp_path)], shuffle=False))


def test_files_that_shrink_while_they_are_read(tmp_path: Path, reading):
    path = tmp_path / "a.tfrecord"
    write_records(path, [([n] * LENGTH, [1] * LENGTH, [n] * LENGTH) for n in range(8)])
    found = reading(data_dir=[str(tmp_path)])
    next(found)
    path.write_bytes(b"")
    with pytest.raises(DataFault, match="holds 0 records, expected at least one batch of 4"):
        _numbers(found)


def test_what_the_model_gets(reading):
    ids, ignored, labels = next(reading(shuffle=False))
    assert (ids.dtype, ignored.dtype, labels.dtype) == (np.int32, np.float32, np.int32)
    assert ids.shape == ignored.shape == labels.shape == (4, LENGTH)
    assert np.array_equal(ignored, [[0, 0, 0, 1]] * 4)
    assert np.array_equal(labels, ids + 1)


def write_text_records(path: Path, rows: list[list[int]]) -> None:
    """Write records as `create_finetune_tfrecords.py` of mesh-transformer-jax does."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            values = tf.train.Feature(int64_list=tf.train.Int64List(value=row))
            features = tf.train.Features(feature={"text": values})
            writer.write(tf.train.Example(features=features).SerializeToString())


def test_records_of_the_original_trainer(tmp_path: Path, reading, monkeypatch):
    rows = [[10 * n + k for k in range(LENGTH + 1)] for n in range(6)]
    (tmp_path / "set").mkdir()
    write_text_records(tmp_path / "set/a_6.tfrecords", rows)
    index = tmp_path / "set.train.index"
    index.write_text("set/a_6.tfrecords\n\n")
    for place in (tmp_path / "set", index):
        found = reading(data_dir=[str(place)], batch_size=2, shuffle=False, repeat=False)
        batches = list(found)
        assert np.array_equal(np.concatenate([b[0] for b in batches]), [r[:-1] for r in rows])
        assert np.array_equal(np.concatenate([b[2] for b in batches]), [r[1:] for r in rows])
        assert not np.any([b[1] for b in batches])
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")  # then the folder of the index counts
    assert len(_numbers(reading(data_dir=[str(index)], shuffle=False, repeat=False))) == 1
    with pytest.raises(DataFault, match="input_ids has 4 tokens, expected max_sequence_length"):
        reading(data_dir=[str(index)], max_sequence_length=5)
    write_records(tmp_path / "set/b.tfrecords", [[[1] * LENGTH] * 3])
    with pytest.raises(DataFault, match=r"a_6.tfrecords holds records of text, .*b.tfrecords of"):
        reading(data_dir=[str(tmp_path / "set")])
    write_text_records(tmp_path / "set/b.tfrecords", [[1, 2, 3, 4, VOCAB]])
    with pytest.raises(DataFault, match=r"b\.tfrecords: record 0 at byte 0: labels holds 50400"):
        reading(data_dir=[str(tmp_path / "set")])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("gs://bucket/a.tfrecords\n", "lists gs://bucket/a.tfrecords, which is not a file here"),
        ("a.tfrecords", "lists a.tfrecords, which is not a file here"),
        ("\n", "lists no file"),
    ],
)
def test_an_index_without_its_files(content: str, words: str, tmp_path: Path, reading):
    (tmp_path / "a.index").write_text(content)
    with pytest.raises((UsageError, DataFault), match=words):
        reading(data_dir=[str(tmp_path / "a.index")])


def test_every_epoch_is_shuffled_otherwise_and_nothing_else_matters(reading):
    first = _numbers(reading(), 15)
    tf.random.set_seed(99)
    assert _numbers(reading(), 15) == first
    epochs = [[i for batch in first[at : at + 5] for i in batch] for at in (0, 5, 10)]
    assert all(len(set(e)) == 20 for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert _numbers(reading(shuffle_seed=5), 15) != first


@pytest.mark.parametrize("fields", [{"shuffle": False}, {"shuffle_buffer": 7}])
def test_reading_resumes_at_a_place(fields: dict, reading):
    expected = _numbers(reading(**fields), 30)
    for skip, more in ((4, 1), (5, 0), (7, 9)):
        found = reading(skip=skip, **fields)
        assert _numbers(found, more) == expected[skip : skip + more]
        assert found.place[0] in (skip // 5, (skip + more - 1) // 5)
        assert _numbers(reading(skip=found.place, **fields), 1) == [expected[skip + more]]


def test_skip_steps_count_at_the_start_alone(reading):
    expected = _numbers(reading(shuffle=False), 5)
    begun = reading(shuffle=False, skip_steps=2)
    assert _numbers(begun, 2) == expected[2:4]
    resumed = reading(shuffle=False, skip_steps=2, skip=begun.place)
    assert _numbers(resumed, 1) == expected[4:5]


@given(
    sizes=st.lists(st.integers(1, 11), min_size=2, max_size=4),
    counts=st.lists(st.integers(1, 6), min_size=4, max_size=4),
    shuffle=st.booleans(),
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_place_holds_for_another_batch_size(
    sizes: list[int], counts: list[int], shuffle: bool, reading
):
    """No record of an epoch is read twice, and none is left out but at its end."""
    fields = {"shuffle": shuffle, "shuffle_buffer": 7}
    order = [i for batch in _numbers(reading(batch_size=1, **fields), 22 * 14) for i in batch]
    place, epoch, at = Place(), 0, 0
    for size, count in zip(sizes, counts, strict=False):
        found = reading(batch_size=size, skip=place, **fields)
        for numbers in _numbers(found, count):
            if at + size > 22:
                epoch, at = epoch + 1, 0
            assert numbers == order[22 * epoch + at : 22 * epoch + at + size]
            at += size
        assert place.after(count, size=size, records=22) == found.place
        place = found.place
        assert place == (epoch, at)


def test_whole_epochs_are_left_out_unread(reading, records):
    begun = time.monotonic()
    expected = _numbers(reading(shuffle=False), 5)
    assert _numbers(reading(shuffle=False, skip=5 * 10**8), 5) == expected
    assert time.monotonic() - begun < 5
    assert _numbers(reading(repeat=False, skip=5)) == []


def test_workers_together_get_what_one_gets_alone(reading):
    alone = _numbers(reading(skip=3), 9)
    shares = [_numbers(reading(skip=3, rows=slice(n, None, 2)), 9) for n in range(2)]
    together = [[a, b, c, d] for (a, c), (b, d) in zip(*shares, strict=True)]
    assert together == alone
    shares = [_numbers(reading(skip=3, rows=slice(n, n + 2)), 9) for n in (0, 2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == alone


def test_fewer_records_than_a_batch(reading):
    with pytest.raises(DataFault, match="holds 22 records, expected at least one batch of 23"):
        reading(batch_size=23)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of this program: files of 3, 3 and 1 examples, and what it noted of them."""
    folder = tmp_path_factory.mktemp("written")
    write_tokenizer(folder)
    (folder / "a.txt").write_text("word " * 30)
    options = TextOptions(tokenizer=folder)
    recipe = TextRecipe(options=options, length=LENGTH, whole_files=True)
    part = Part(files=(folder / "a.txt",))
    for _ in build([part], recipe, folder / "data", Options(examples_per_file=3)):
        pass
    return folder / "data"


def _cut_at_border(path: Path) -> None:
    offsets = [offset for _, offset, _ in read_records(path, max_bytes=1 << 20)]
    path.write_bytes(path.read_bytes()[: offsets[-1]])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda folder: (folder / "records-00001.tfrecord").unlink(),
        r"records-00001.tfrecord: missing; .* states 3 files with 7 examples, found 2",
    ),
    "empty": (
        lambda folder: (folder / "records-00001.tfrecord").write_bytes(b""),
        "records-00001.tfrecord: is empty",
    ),
    "cut at a border": (
        lambda folder: _cut_at_border(folder / "records-00001.tfrecord"),
        r"records-00001.tfrecord: holds 2 examples in .* states 3 examples in",
    ),
    "cut in a record": (
        lambda folder: (path := folder / "records-00001.tfrecord").write_bytes(
            path.read_bytes()[:-3]
        ),
        r"records-00001.tfrecord: record 2 at byte \d+: the file ends inside it",
    ),
    "one too many": (
        lambda folder: shutil.copy(folder / "records-00001.tfrecord", folder / "x.tfrecord"),
        r"x.tfrecord: is not one of the 3 files with 7 examples",
    ),
    "what was noted is cut": (
        lambda folder: (folder / "data_params.json").write_text('{"arguments": {'),
        r"data_params.json: is not JSON",
    ),
    "a flipped byte": (
        lambda folder: _flip(folder / "records-00000.tfrecord"),
        r"records-00000.tfrecord: record 1 at byte \d+: the checksum of its data is wrong",
    ),
}


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_not_those_that_were_written(
    damage: str, written: Path, tmp_path: Path, reading
):
    folder = shutil.copytree(written, tmp_path / "data")
    assert count_records(sorted(folder.glob("*.tfrecord"))) == 7
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(DataFault, match=words):
        _numbers(reading(data_dir=[str(folder)], repeat=False, batch_size=2))


def test_files_of_others_are_read_as_they_are(records: Path, tmp_path: Path, reading):
    folder = shutil.copytree(records, tmp_path / "data")
    (folder / "data_params.json").write_text('{"max_seq_length": 4}')
    expected = _numbers(reading(), 5)
    assert _numbers(reading(data_dir=[str(folder)]), 5) == expected
    (folder / "5.tfrecord").write_bytes(b"")
    with pytest.raises(DataFault, match=r"5.tfrecord: is empty"):
        reading(data_dir=[str(folder)])
