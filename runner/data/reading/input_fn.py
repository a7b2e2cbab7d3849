"""Read records in batches, in an order that depends on seed and position alone.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from runner.config.params import InputParams
from runner.data.reading.example import (
    FEATURES,
    INPUT_IDS,
    INPUT_MASK,
    LABELS,
    TEXT,
    parse_together,
)
from runner.data.reading.order import interleave, shuffle
from runner.data.reading.place import Place, place_after, whole_batches
from runner.data.reading.records import (
    check_records,
    count_records,
    find_records,
    hold_text,
    largest_record,
    parse_example,
    read_records,
)

#: Ids int32 (B, T); mask of ignored tokens float32 (B, T), 1 where the loss does not count the
#: label; labels int32 (B, T).
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]

ALL_ROWS = slice(None)

#: Number of batches that are read in advance.
_AHEAD = 3
#: Difference between the seeds of successive epochs.
_SEED_STEP = 1_000_003


class Batches(Iterator[Batch]):
    """Iterator over batches, made by `batches`; a thread reads the next ones in advance.

    Attributes:
        place: place of the next record. It is the whole state: `batches(…, start=place)` continues
            with the next batch, of whatever size.
    """

    def __init__(self, batches: Iterator[tuple[Place, Batch]], start: Place) -> None:
        self.place = start
        self._batches = batches
        self._thread = ThreadPoolExecutor(1, "records")
        self._ahead: deque[Future[tuple[Place, Batch] | None]] = deque()

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            DataFault: a record is damaged or invalid; with file, number and offset.
        """
        # The first batch may come after many records that are skipped: here, an interrupt ends it.
        found = self._ahead.popleft().result() if self._ahead else next(self._batches, None)
        if found is None:
            raise StopIteration
        while len(self._ahead) < _AHEAD:
            self._ahead.append(self._thread.submit(next, self._batches, None))
        self.place, batch = found
        return batch


def batches(
    params: InputParams,
    *,
    vocab_size: int,
    training: bool,
    start: Place | None = None,
    rows: slice = ALL_ROWS,
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
        rows: rows of every batch that are wanted; the others are not parsed.

    Raises:
        UsageError: there are no records.
        DataFault: the files differ from data_params.json, hold fewer records than a batch, or
            the first record of a file is invalid.
    """
    paths = find_records(params.data_dir)
    length = params.max_sequence_length
    check_records(paths, length=length, vocab_size=vocab_size, only_first=True)
    whole_batches(params, count_records(paths, enough=params.batch_size))
    start = place_after(params, params.skip_steps) if start is None else start
    parse = _Parser(length, vocab_size, is_text=hold_text(paths))
    found = (
        (place, parse(records[rows]))
        for place, records in _groups(params, paths, start, training=training)
    )
    return Batches(found, start)


def empty_batch(batch_size: int, length: int) -> Batch:
    """Return a batch of zeros of the right shapes."""
    shape = (batch_size, length)
    return np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.int32)


class _Record(NamedTuple):
    path: Path
    number: int
    offset: int
    """Offset in the uncompressed file, in bytes."""
    data: bytes


def _groups(
    params: InputParams, paths: list[Path], start: Place, *, training: bool
) -> Iterator[tuple[Place, list[_Record]]]:
    """Yield the records of each batch, with the place after them."""
    repeat = training if params.repeat is None else params.repeat
    size = params.batch_size
    for epoch in count(start.epoch) if repeat else range(start.epoch, 1):
        record = start.record if epoch == start.epoch else 0
        # The records before the start were read by an earlier process.
        records = islice(_epoch(params, paths, epoch, training=training), record, None)
        at = record
        while len(group := list(islice(records, size))) == size:
            at += size
            yield Place(epoch, at), group
        if at == 0:
            whole_batches(params, len(group))  # the files have changed since the start


def _epoch(
    params: InputParams, paths: list[Path], number: int, *, training: bool
) -> Iterator[_Record]:
    """Return the records of one epoch, in its order."""
    most = largest_record(params.max_sequence_length)
    records = interleave((_file(path, most) for path in paths), params.n_parallel_reads)
    if not (training if params.shuffle is None else params.shuffle):
        return records
    seed = params.effective_shuffle_seed + number * _SEED_STEP
    return shuffle(records, params.effective_shuffle_buffer, seed)


def _file(path: Path, most: int) -> Iterator[_Record]:
    return (_Record(path, *found) for found in read_records(path, max_bytes=most))


class _Parser:
    """Parses and checks the records of a batch.

    Args:
        length: number of tokens per record, max_sequence_length.
        vocab_size: upper bound of ids, exclusive.
        is_text: whether the records are those of GPT-J's original trainer.
    """

    def __init__(self, length: int, vocab_size: int, *, is_text: bool) -> None:
        self._length = length
        self._vocab_size = vocab_size
        self._is_text = is_text

    def __call__(self, records: list[_Record]) -> Batch:
        """Return the batch.

        Raises:
            DataFault: a record is invalid; with file, number and feature.
        """
        found = self._together(records)
        ids_BT, mask_BT, labels_BT = found or self._one_by_one(records)
        return ids_BT, np.float32(1) - mask_BT.astype(np.float32), labels_BT

    def _together(self, records: list[_Record]) -> Batch | None:
        """Return ids, mask and labels, int32 (B, T); None if a record is invalid or unusual."""
        names = (TEXT,) if self._is_text else FEATURES
        found = parse_together([r.data for r in records], names)
        if found is None:
            return None
        if self._is_text:
            text = found[TEXT]
            parts = text[:, :-1], np.ones_like(text[:, 1:]), text[:, 1:]
        else:
            parts = found[INPUT_IDS], found[INPUT_MASK], found[LABELS]
        tops = self._vocab_size, 2, self._vocab_size
        shape = len(records), self._length
        fits = all(p.shape == shape and p.max() < top for p, top in zip(parts, tops, strict=True))
        return parts if fits else None

    def _one_by_one(self, records: list[_Record]) -> Batch:
        found = [
            parse_example(
                r.data,
                length=self._length,
                vocab_size=self._vocab_size,
                place=f"{r.path}: record {r.number} at byte {r.offset}",
            )
            for r in records
        ]
        ids, mask, labels = (
            np.array([example[name] for example in found], np.int32) for name in FEATURES
        )
        return ids, mask, labels
