"""Records into batches, in an order that is a function of the seed alone.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from gptj_model.errors import DataFault
from runner.data.example import FEATURES, INPUT_IDS, INPUT_MASK, LABELS
from runner.data.records import check_records, find_records
from runner.params import InputParams

#: A batch: ids int32 (B, T), ignored float32 (B, T) with 1 on tokens that do not count,
#: labels int32 (B, T).
Batch = tuple[tf.Tensor, tf.Tensor, tf.Tensor]

#: The shuffle's seed when the YAML names none: a run must be able to continue.
DEFAULT_SEED = 1


def batches(
    params: InputParams, *, vocab_size: int, training: bool, skip: int = 0
) -> Iterator[Batch]:
    """Batches as the reference makes them: files sorted and interleaved, shuffled, batched
    without the incomplete last one of an epoch, then repeated.

    Args:
        params: the YAML section; shuffle and repeat default to `training`.
        vocab_size: of the model.
        training: chooses those defaults.
        skip: batches to leave out at the beginning, when a run continues.

    Raises:
        UsageError: there are no records.
        DataFault: one is damaged or does not fit; with file and record.
    """
    paths = find_records(params.data_dir)
    length = params.max_sequence_length
    check_records(paths, length=length, vocab_size=vocab_size, only_first=True)
    dataset = _dataset(params, paths, training).skip(skip + params.skip_steps)
    dataset = dataset.map(_parser(length, vocab_size)).prefetch(tf.data.AUTOTUNE)
    return _iterate(dataset, params, paths, vocab_size, may_be_empty=skip > 0)


def _iterate(
    dataset: tf.data.Dataset,
    params: InputParams,
    paths: list[Path],
    vocab_size: int,
    *,
    may_be_empty: bool,
) -> Iterator[Batch]:
    where = ", ".join(params.data_dir)
    empty = not may_be_empty
    try:
        for batch in dataset:
            empty = False
            yield batch
    except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as e:
        # TensorFlow does not say which record it was.
        check_records(paths, length=params.max_sequence_length, vocab_size=vocab_size)
        raise DataFault(f"{where}: cannot be read: {e.message}") from None
    if empty:
        raise DataFault(
            f"{where}: holds fewer records than one batch of {params.batch_size}",
            hint="choose a smaller batch_size",
        )


def _dataset(params: InputParams, paths: list[Path], training: bool) -> tf.data.Dataset:
    files = tf.data.Dataset.from_tensor_slices([str(p) for p in paths])
    dataset = files.interleave(
        lambda path: tf.data.TFRecordDataset(path, buffer_size=1 << 20),
        cycle_length=params.n_parallel_reads,
    )
    if training if params.shuffle is None else params.shuffle:
        dataset = dataset.shuffle(
            params.shuffle_buffer or 10 * params.batch_size,
            seed=DEFAULT_SEED if params.shuffle_seed is None else params.shuffle_seed,
        )
    dataset = dataset.batch(params.batch_size, drop_remainder=True)
    if training if params.repeat is None else params.repeat:
        dataset = dataset.repeat()
    return dataset


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
