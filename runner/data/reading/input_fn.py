"""Records into batches, in an order that is a function of seed and position alone.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from gptj_model.errors import ConfigError, DataFault
from runner.config.params import InputParams
from runner.data.reading.example import FEATURES, INPUT_IDS, INPUT_MASK, LABELS
from runner.data.reading.records import check_records, count_records, find_records, is_compressed

#: A batch: ids int32 (B, T), ignored float32 (B, T) with 1 on tokens that do not count,
#: labels int32 (B, T).
Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

#: What TensorFlow mixes into every seed where nobody has set a global one.
_GLOBAL_SEED = 87654321
#: From the seed of one epoch to that of the next.
_SEED_STEP = 1_000_003
#: Bytes of a file that are read at a time.
_BUFFER = 1 << 20
#: More epochs than any run has.
_ENDLESS = 2**31


class Batches(Iterator[Batch]):
    """Batches in the order that `batches` tells.

    Attributes:
        position: batches given so far, with those that were left out at the beginning. It is all
            the state there is: `batches(…, skip=position)` gives what this would have given next.
    """

    def __init__(
        self, dataset: tf.data.Dataset, params: InputParams, vocab_size: int, position: int
    ) -> None:
        self.position = position
        self._iterator = iter(dataset)
        self._params = params
        self._vocab_size = vocab_size

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataFault: a record is damaged or does not fit; with file, number and offset.
        """
        try:
            batch = next(self._iterator)
        except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as e:
            # TensorFlow does not say which record it was.
            folders, length = self._params.data_dir, self._params.max_sequence_length
            check_records(find_records(folders), length=length, vocab_size=self._vocab_size)
            raise DataFault(f"{', '.join(folders)}: cannot be read: {e.message}") from None
        self.position += 1
        return batch


def batches(
    params: InputParams,
    *,
    vocab_size: int,
    training: bool,
    skip: int = 0,
    worker: int = 0,
    workers: int = 1,
) -> Batches:
    """Batches as the reference makes them: files sorted and interleaved, shuffled, batched
    without the incomplete last one of an epoch, then repeated.

    Each epoch is shuffled by a seed of its own, which follows from its number, so that whole
    epochs can be left out unread.

    Args:
        params: the YAML section; shuffle and repeat default to `training`.
        vocab_size: of the model.
        training: chooses those defaults.
        skip: batches to leave out at the beginning, when a run continues.
        worker: which one this is, from 0.
        workers: share every batch; together they get what one alone would.

    Raises:
        UsageError: there are no records.
        ConfigError: the batch cannot be shared evenly.
        DataFault: the files are not those that were written, hold fewer records than a batch, or
            begin with one that does not fit.
    """
    if params.batch_size % workers:
        raise ConfigError(
            f"batch_size is {params.batch_size}, expected a multiple of the {workers} workers"
        )
    paths = find_records(params.data_dir)
    length = params.max_sequence_length
    check_records(paths, length=length, vocab_size=vocab_size, only_first=True)
    epoch, within = _place(params, paths, skip + params.skip_steps)
    repeat = training if params.repeat is None else params.repeat
    shuffle = training if params.shuffle is None else params.shuffle
    numbers = tf.data.Dataset.range(epoch, _ENDLESS if repeat else max(epoch, 1))
    dataset = (
        numbers.flat_map(_epoch(params, paths, shuffle=shuffle))
        .skip(within)
        .map(lambda serialized: serialized[worker::workers])
        .map(_parser(length, vocab_size))
        .prefetch(tf.data.AUTOTUNE)
    )
    return Batches(dataset, params, vocab_size, skip)


def _place(params: InputParams, paths: list[Path], position: int) -> tuple[int, int]:
    """The epoch of a batch, and its number there."""
    size = params.batch_size
    # Only who is not at the beginning must know where the first epoch ends.
    records = count_records(paths, enough=None if position else size)
    if records < size:
        where = ", ".join(params.data_dir)
        raise DataFault(
            f"{where}: holds fewer records than one batch of {size}, found {records}",
            hint="choose a smaller batch_size",
        )
    return divmod(position, records // size) if position else (0, 0)


def _epoch(params: InputParams, paths: list[Path], *, shuffle: bool):
    """What makes an epoch of its number: batches of serialized records."""
    names = [str(p) for p in paths]
    kinds = ["GZIP" if is_compressed(p) else "" for p in paths]
    seed = params.effective_shuffle_seed

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        records = tf.data.Dataset.from_tensor_slices((names, kinds)).interleave(
            lambda *file: tf.data.TFRecordDataset(*file, buffer_size=_BUFFER),
            cycle_length=params.n_parallel_reads,
        )
        if shuffle:
            # Of this function's graph alone: what others do with the global seed must not matter.
            tf.compat.v1.set_random_seed(_GLOBAL_SEED)
            buffer = params.effective_shuffle_buffer
            own: Any = seed + number * _SEED_STEP
            records = records.shuffle(buffer, seed=own, reshuffle_each_iteration=False)
        return records.batch(params.batch_size, drop_remainder=True)

    return epoch


def _parser(length: int, vocab_size: int):
    features = {name: tf.io.FixedLenFeature([length], tf.int64) for name in FEATURES}

    def parse(serialized: tf.Tensor) -> Batch:
        example: dict[str, Any] = tf.io.parse_example(serialized, features)
        # Compiled code would clamp such an id in silence.
        for name in (INPUT_IDS, LABELS):
            ids = tf.cast(example[name], tf.uint64)  # a negative one becomes huge
            tf.debugging.assert_less(ids, tf.constant(vocab_size, tf.uint64))
        return (
            tf.cast(example[INPUT_IDS], tf.int32),
            1.0 - tf.cast(example[INPUT_MASK], tf.float32),
            tf.cast(example[LABELS], tf.int32),
        )

    return parse
