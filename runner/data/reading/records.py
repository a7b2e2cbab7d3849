"""Training records: TFRecord files of three int64 lists, written, found and checked.

A TFRecord is a length (uint64), its masked crc32c, the data, and the data's masked crc32c. The
file may be compressed with gzip as a whole.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from crc32c import crc32c

from gptj_convert.formats.containers.leveldb_table import masked
from gptj_model.errors import DataFault, UsageError
from runner.data.reading.data_params import PARAMS_FILE, StatedFile, stated_files
from runner.data.reading.example import FEATURES, INPUT_MASK, max_bytes, parse, serialize

PATTERN = "*.tfrecord*"
GZIP_MAGIC = b"\x1f\x8b"
#: Fast: token ids hold little that a slower level would find.
_GZIP_LEVEL = 3

_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")
#: Bytes of the largest record, where the number of its tokens is not known.
_LARGEST = max_bytes(2**20)

DATA_HINT = (
    "make records with `gptj data text SRC… --tokenizer DIR --max-sequence-length N --out data`"
)


def find_records(folders: Sequence[str], pattern: str = PATTERN) -> list[Path]:
    """Every record file of the folders, sorted, and held against their data_params.json.

    Raises:
        UsageError: a folder does not exist, or there is no record at all.
        DataFault: a file is empty, or the files are not those that were written.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError(f"{folder}: not found, expected a folder of {pattern}", hint=DATA_HINT)
        found += (p for p in folder.glob(pattern) if p.is_file() and p.name[0] != ".")
    if not found:
        deeper = sorted({p.parent for f in folders for p in Path(f).glob(f"*/{pattern}")})
        hint = f"{', '.join(map(str, deeper))} holds some: name it" if deeper else DATA_HINT
        raise UsageError(
            f"{', '.join(folders)}: holds no {pattern}, expected training records", hint=hint
        )
    found.sort()
    for folder in map(Path, folders):
        check_files(folder, [p for p in found if p.parent == folder])
    return found


def check_files(folder: Path, paths: Sequence[Path]) -> None:
    """Hold names and sizes of a folder's record files against what was noted of them.

    Raises:
        DataFault: a file is missing, too many, empty or of another size; with both counts.
    """
    anew = "bring it back, or make the records anew"
    stated = stated_files(folder)
    found = {p.name: p for p in paths}
    for name in stated or ():
        if name not in found:
            assert stated
            raise DataFault(
                f"{folder / name}: missing; {PARAMS_FILE} states {_total(stated)}, found "
                f"{len(found.keys() & stated.keys())}",
                hint=anew,
            )
    for name, path in found.items():
        size = path.stat().st_size
        if not size:
            raise DataFault(f"{path}: is empty, expected records", hint=anew)
        if stated is None:
            continue
        if name not in stated:
            raise DataFault(
                f"{path}: is not one of the {_total(stated)} that {PARAMS_FILE} states",
                hint="move it to another folder, and name both",
            )
        if size != (expected := stated[name]).bytes:
            # What has no checksum of its records is not counted: their number may be a lie too.
            count = f"{count_records([path])} examples in " if path.match(PATTERN) else ""
            raise DataFault(
                f"{path}: holds {count}{size} bytes, {PARAMS_FILE} states {expected.examples} "
                f"examples in {expected.bytes}",
                hint=anew,
            )


def _total(stated: Mapping[str, StatedFile]) -> str:
    return f"{len(stated)} files with {sum(f.examples for f in stated.values())} examples"


def count_records(paths: Iterable[Path], *, enough: int | None = None) -> int:
    """Records of the files: those noted in data_params.json, else by reading up to `enough`.

    Raises:
        DataFault: a file is damaged.
    """
    count = 0
    for path in paths:
        if enough is not None and count >= enough:
            break
        stated = (stated_files(path.parent) or {}).get(path.name)
        if stated and stated.bytes == path.stat().st_size:
            count += stated.examples
        else:
            left = None if enough is None else enough - count
            count += sum(1 for _ in islice(read_records(path, max_bytes=_LARGEST), left))
    return count


class RecordWriter:
    """One TFRecord file.

    Args:
        path: of the file, which must not exist.
        compress: with gzip.

    Raises:
        OSError: it exists, or writing fails.
    """

    def __init__(self, path: Path, *, compress: bool = False) -> None:
        self._raw = path.open("xb")
        self._file: BinaryIO = self._raw
        if compress:
            # Neither a name nor a time, so that the same records give the same file.
            packed = gzip.GzipFile("", "wb", _GZIP_LEVEL, self._raw, mtime=0)
            self._file = cast(BinaryIO, packed)

    def write(self, block: np.ndarray) -> None:
        """Append a block of examples, int32 of shape (examples, 3, tokens)."""
        for data in serialize(block):
            head = len(data).to_bytes(8, "little")
            self._file.write(head + _CRC.pack(masked(crc32c(head))))
            self._file.write(data)
            self._file.write(_CRC.pack(masked(crc32c(data))))

    def close(self) -> None:
        """Return once the file is on the device."""
        if self._file is not self._raw:
            self._file.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self._raw.close()

    def discard(self) -> None:
        """Close the file as it is."""
        self._raw.close()


def is_compressed(path: Path) -> bool:
    """Whether the file is compressed with gzip, whatever its name."""
    with path.open("rb") as f:
        return f.read(len(GZIP_MAGIC)) == GZIP_MAGIC


def read_records(path: Path, *, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Number, offset (in the uncompressed file) and data of each record.

    Raises:
        DataFault: with file, record and offset: a checksum is wrong, the file ends inside a
            record, or a record claims more than `max_bytes`.
    """
    with gzip.open(path) if is_compressed(path) else path.open("rb") as f:
        number = offset = 0
        while True:
            place = f"{path}: record {number} at byte {offset}"
            head = _read(f, _LENGTH.size, place)
            if not head:
                return
            if len(head) < _LENGTH.size:
                raise DataFault(f"{place}: the file ends inside its length")
            length, crc = _LENGTH.unpack(head)
            if masked(crc32c(head[:8])) != crc:
                raise DataFault(f"{place}: the checksum of its length is wrong")
            if length > max_bytes:
                raise DataFault(f"{place}: claims {length} bytes, expected at most {max_bytes}")
            body = _read(f, length + _CRC.size, place)
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


def _read(file, size: int, place: str) -> bytes:
    try:
        return file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataFault(f"{place}: its compression is damaged: {e}") from None


def read_examples(
    path: Path, *, length: int | None = None, vocab_size: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Number and lists (int64) of each example, held against what the model takes.

    Args:
        path: a record file.
        length: max_sequence_length; the first example's, if it is not known.
        vocab_size: ids must be below.

    Raises:
        DataFault: the first record that is not as it must be, with file, number and feature.
    """
    # Names and varints of at most 10 bytes: more is not our record.
    limit = max(max_bytes(length), 1 << 20) if length else _LARGEST
    for number, offset, data in read_records(path, max_bytes=limit):
        place = f"{path}: record {number} at byte {offset}"
        try:
            example = parse(data)
        except ValueError as e:
            raise DataFault(f"{place}: is not a tf.train.Example: {e}") from None
        length = length or len(example.get(FEATURES[0], ())) or None
        check_example(example, length or 1, vocab_size, place)
        yield number, example


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
    for path in paths:
        for _ in read_examples(path, length=length, vocab_size=vocab_size):
            if only_first:
                break


def check_example(
    example: Mapping[str, np.ndarray], length: int, vocab_size: int, place: str
) -> None:
    """Hold one example's lists against what the model takes.

    Raises:
        DataFault: with `place` and the feature.
    """
    for name in FEATURES:
        if name not in example:
            raise DataFault(f"{place}: has no {name}, expected {', '.join(FEATURES)}")
        values = example[name]
        if len(values) != length:
            raise DataFault(
                f"{place}: {name} has {len(values)} tokens, expected max_sequence_length = "
                f"{length}",
                hint=f"set max_sequence_length to {len(values)} in the section that names the "
                "records, train_input or eval_input, or make them anew",
            )
        top = 2 if name == INPUT_MASK else vocab_size
        if values.min() < 0 or values.max() >= top:
            bad = int(values[(values < 0) | (values >= top)][0])
            raise DataFault(f"{place}: {name} holds {bad}, expected 0 to {top - 1}")
