"""Read records in batches, in an order that depends on seed and position alone.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from gptj_model.errors import DataFault
from runner.config.params import InputParams
from runner.data.reading.example import FEATURES, INPUT_IDS, INPUT_MASK, LABELS, TEXT
from runner.data.reading.place import Place, check_shares, place_after, whole_batches
from runner.data.reading.records import (
    check_records,
    count_records,
    find_records,
    hold_text,
    is_compressed,
)

#: Ids int32 (B, T); mask of ignored tokens float32 (B, T), 1 where the loss does not count the
#: label; labels int32 (B, T).
Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

#: Global seed of TensorFlow when none is set; it is mixed into every seed.
_GLOBAL_SEED = 87654321
#: Difference between the seeds of successive epochs.
_SEED_STEP = 1_000_003
#: Size of the read buffer of a file in bytes.
_BUFFER = 1 << 20
#: Number of epochs of an endless run.
_ENDLESS = 2**31


class Batches(Iterator[Batch]):
    """Iterator over batches, made by `batches`.

    Attributes:
        place: place of the next record. It is the whole state: `batches(…, start=place)` continues
            with the next batch, of whatever size.
    """

    def __init__(
        self, dataset: tf.data.Dataset, params: InputParams, vocab_size: int, start: Place
    ) -> None:
        self.place = start
        self._iterator = iter(dataset)
        self._params = params
        self._vocab_size = vocab_size

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            DataFault: a record is damaged or invalid; with file, number and offset.
        """
        try:
            epoch, batch = next(self._iterator)
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as e:
            # TensorFlow does not name the record, so look for it.
            folders, length = self._params.data_dir, self._params.max_sequence_length
            check_records(find_records(folders), length=length, vocab_size=self._vocab_size)
            raise DataFault(f"{', '.join(folders)}: cannot be read: {e.message}") from None
        begin = self.place.record if epoch == self.place.epoch else 0
        self.place = Place(int(epoch), begin + self._params.batch_size)
        return batch


def batches(
    params: InputParams,
    *,
    vocab_size: int,
    training: bool,
    start: Place | None = None,
    worker: int = 0,
    workers: int = 1,
) -> Batches:
    """Return the batches of a section of params.yaml, in the order of the reference.

    Files are sorted and interleaved, records shuffled and batched without the incomplete last
    batch of an epoch, and epochs repeated. Each epoch has a shuffle seed that follows from its
    number, so that whole epochs can be skipped without reading them.

    Args:
        params: section train_input or eval_input.
        vocab_size: size of the model's vocabulary.
        training: default of shuffle and repeat.
        start: place to resume at; None starts after the section's `skip_steps` batches.
        worker: number of this worker, from 0.
        workers: number of workers that divide every batch among them.

    Raises:
        UsageError: there are no records.
        ConfigError: batch_size is not a multiple of the number of workers.
        DataFault: the files differ from data_params.json, hold fewer records than a batch, or
            the first record of a file is invalid.
    """
    check_shares(params, workers)
    paths = find_records(params.data_dir)
    length = params.max_sequence_length
    check_records(paths, length=length, vocab_size=vocab_size, only_first=True)
    whole_batches(params, count_records(paths, enough=params.batch_size))
    start = place_after(params, params.skip_steps) if start is None else start
    repeat = training if params.repeat is None else params.repeat
    shuffle = training if params.shuffle is None else params.shuffle
    last = _ENDLESS if repeat else max(start.epoch, 1)
    parse = _parser(length, vocab_size, is_text=hold_text(paths))
    dataset = (
        tf.data.Dataset.range(start.epoch, last)
        .flat_map(_epoch(params, paths, start, shuffle=shuffle))
        .map(lambda epoch, serialized: (epoch, parse(serialized[worker::workers])))
        .prefetch(tf.data.AUTOTUNE)
    )
    return Batches(dataset, params, vocab_size, start)


def _epoch(params: InputParams, paths: list[Path], start: Place, *, shuffle: bool):
    """Return a function from the number of an epoch to that number with each of its batches of
    serialized records."""
    names = [str(p) for p in paths]
    kinds = ["GZIP" if is_compressed(p) else "" for p in paths]
    seed = params.effective_shuffle_seed

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        records = tf.data.Dataset.from_tensor_slices((names, kinds)).interleave(
            lambda *file: tf.data.TFRecordDataset(*file, buffer_size=_BUFFER),
            cycle_length=params.n_parallel_reads,
        )
        if shuffle:
            # This sets the seed of this graph alone: no other use of the global seed may matter.
            tf.compat.v1.set_random_seed(_GLOBAL_SEED)
            buffer = params.effective_shuffle_buffer
            own: Any = seed + number * _SEED_STEP
            records = records.shuffle(buffer, seed=own, reshuffle_each_iteration=False)
        # The records before the start were read by an earlier process.
        read = tf.where(number == start.epoch, tf.constant(start.record, tf.int64), 0)
        grouped = records.skip(read).batch(params.batch_size, drop_remainder=True)
        return grouped.map(lambda serialized: (number, serialized))

    return epoch


def _parser(length: int, vocab_size: int, *, is_text: bool):
    features = {name: tf.io.FixedLenFeature([length], tf.int64) for name in FEATURES}
    if is_text:
        features = {TEXT: tf.io.FixedLenFeature([length + 1], tf.int64)}

    def parse(serialized: tf.Tensor) -> Batch:
        example: dict[str, Any] = tf.io.parse_example(serialized, features)
        if is_text:
            ids = example[TEXT]
            example = {INPUT_IDS: ids[:, :-1], INPUT_MASK: tf.ones_like(ids[:, 1:])}
            example[LABELS] = ids[:, 1:]
        # Compiled code would silently clamp an id that is out of range.
        for name in (INPUT_IDS, LABELS):
            ids = tf.cast(example[name], tf.uint64)  # a negative id becomes huge
            tf.debugging.assert_less(ids, tf.constant(vocab_size, tf.uint64))
        return (
            tf.cast(example[INPUT_IDS], tf.int32),
            1.0 - tf.cast(example[INPUT_MASK], tf.float32),
            tf.cast(example[LABELS], tf.int32),
        )

    return parse
