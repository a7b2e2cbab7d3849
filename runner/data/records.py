"""Training records: TFRecord files of three int64 lists, written, found and checked.

A TFRecord is a length (uint64), its masked crc32c, the data, and the data's masked crc32c.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from crc32c import crc32c

from gptj_convert.formats.bundle import masked
from gptj_model.errors import DataFault, UsageError

#: The features of an example, each a list of max_sequence_length numbers.
INPUT_IDS = "input_ids"
INPUT_MASK = "input_mask"
"""1 on real tokens, on disk; the input function hands the inverse to the model."""
LABELS = "labels"
FEATURES = (INPUT_IDS, INPUT_MASK, LABELS)

PATTERN = "*.tfrecord*"
#: Arguments and counts of the run that wrote the records.
PARAMS_FILE = "data_params.json"

_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")


def find_records(folders: Sequence[str]) -> list[Path]:
    """Every record file of the folders, sorted.

    Raises:
        UsageError: a folder does not exist, or there is no record at all.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"{folder}: not found, expected a folder of {PATTERN}", hint=DATA_HINT)
        found += (p for p in folder.glob(PATTERN) if p.is_file())
    if not found:
        raise UsageError(
            f"{', '.join(folders)}: holds no {PATTERN}, expected training records", hint=DATA_HINT
        )
    return sorted(found)


DATA_HINT = (
    "make records with `gptj data text SRC… --tokenizer DIR --max-sequence-length N --out data`"
)


class RecordWriter:
    """One TFRecord file, which takes its name when it is complete.

    Args:
        path: the final name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._writer = tf.io.TFRecordWriter(str(self._partial))
        self.count = 0

    def write(self, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray) -> None:
        """Append one example of three equally long int sequences."""
        features = {
            name: tf.train.Feature(int64_list=tf.train.Int64List(value=values))
            for name, values in zip(FEATURES, (ids, mask, labels), strict=True)
        }
        example = tf.train.Example(features=tf.train.Features(feature=features))
        self._writer.write(example.SerializeToString(deterministic=True))
        self.count += 1

    def close(self) -> None:
        """Make the file durable and give it its name."""
        self._writer.close()
        with self._partial.open("rb+") as f:
            os.fsync(f.fileno())
        self._partial.rename(self._path)

    def discard(self) -> None:
        """Remove what was written."""
        self._writer.close()
        self._partial.unlink(missing_ok=True)


def read_records(path: Path, *, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset and data of each record.

    Raises:
        DataFault: with file, record and offset: a checksum is wrong, the file ends inside a
            record, or a record claims more than `max_bytes`.
    """
    with path.open("rb") as f:
        number = offset = 0
        while head := f.read(_LENGTH.size):
            place = f"{path}: record {number} at byte {offset}"
            if len(head) < _LENGTH.size:
                raise DataFault(f"{place}: the file ends inside its length")
            length, crc = _LENGTH.unpack(head)
            if masked(crc32c(head[:8])) != crc:
                raise DataFault(f"{place}: the checksum of its length is wrong")
            if length > max_bytes:
                raise DataFault(f"{place}: claims {length} bytes, expected at most {max_bytes}")
            body = f.read(length + _CRC.size)
            if len(body) < length + _CRC.size:
                raise DataFault(
                    f"{place}: the file ends inside it, {length + 4 - len(body)} bytes short"
                )
            data = body[:length]
            if masked(crc32c(data)) != _CRC.unpack(body[length:])[0]:
                raise DataFault(f"{place}: the checksum of its data is wrong")
            yield number, offset, data
            number += 1
            offset += _LENGTH.size + length + _CRC.size


def check_records(
    paths: Sequence[Path], *, length: int, vocab_size: int, only_first: bool = False
) -> None:
    """Hold records against what the model takes.

    Args:
        paths: record files.
        length: max_sequence_length.
        vocab_size: ids must be below.
        only_first: look at one record a file.

    Raises:
        DataFault: the first record that is not as it must be, with file, number and feature.
    """
    # Three lists of varints of at most 10 bytes, and names: more is not our record.
    max_bytes = 3 * (10 * length + 64) + 1024
    for path in paths:
        for number, _, data in read_records(path, max_bytes=max(max_bytes, 1 << 20)):
            problem = _problem(data, length, vocab_size)
            if problem:
                raise DataFault(f"{path}: record {number}: {problem[0]}", hint=problem[1])
            if only_first:
                break


def _problem(data: bytes, length: int, vocab_size: int) -> tuple[str, str | None] | None:
    try:
        example = tf.train.Example.FromString(data)
    except Exception:  # protobuf raises its own kinds for broken messages
        return "is not a tf.train.Example", None
    for name in FEATURES:
        values = np.asarray(example.features.feature[name].int64_list.value, np.int64)
        if len(values) != length:
            return (
                f"{name} has {len(values)} tokens, expected max_sequence_length = {length}",
                f"--set train_input.max_sequence_length={len(values)}, or make the records anew",
            )
        top = 2 if name == INPUT_MASK else vocab_size
        if values.min() < 0 or values.max() >= top:
            bad = int(values[(values < 0) | (values >= top)][0])
            return f"{name} holds {bad}, expected 0 to {top - 1}", None
    return None


def write_data_params(folder: Path, values: dict[str, Any]) -> None:
    """Keep arguments and counts beside the records."""
    text = json.dumps(values, indent=1, sort_keys=True) + "\n"
    (folder / PARAMS_FILE).write_text(text, encoding="utf-8")
