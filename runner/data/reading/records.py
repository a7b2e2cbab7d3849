"""Write, find and check TFRecord files of training records.

Each record is a tf.train.Example of three int64 lists. It is stored as its length (uint64), the
masked crc32c of the length, the data, and the masked crc32c of the data. A whole file may be
compressed with gzip.
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
from runner.data.reading.data_params import DATA_PARAMS_FILE, RecordFileFacts, stated_files
from runner.data.reading.example import (
    FEATURES,
    INPUT_IDS,
    INPUT_MASK,
    TEXT,
    max_bytes,
    of_text,
    parse,
    serialize,
)
from runner.data.reading.other_data import (
    DATA_HINT,
    INDEX_SUFFIX,
    PATTERN,
    no_records,
    not_a_folder,
)

GZIP_MAGIC = b"\x1f\x8b"
#: Compression level; slower levels gain little on token ids.
_GZIP_LEVEL = 3

#: Size of the read buffer of a file in bytes.
_BUFFER = 1 << 20

_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")
#: Size limit in bytes of a record whose number of tokens is unknown.
MAX_RECORD_BYTES = max_bytes(2**20)


def find_records(folders: Sequence[str]) -> list[Path]:
    """Return every record file of the folders, sorted and checked against data_params.json.

    A folder may also be an index: a file that lists record files.

    Raises:
        UsageError: a folder does not exist, or there is no record file at all.
        DataFault: a file is empty, or the files differ from data_params.json.
    """
    found: list[Path] = []
    for folder in map(Path, folders):
        if is_index(folder):
            found += listed_records(folder)
            continue
        if not folder.is_dir():
            raise not_a_folder(folder)
        found += (p for p in folder.glob(PATTERN) if p.is_file() and p.name[0] != ".")
    if not found:
        raise no_records(folders)
    found.sort()
    for folder in map(Path, folders):
        if not is_index(folder):
            check_files(folder, [p for p in found if p.parent == folder])
    return found


def is_index(path: Path) -> bool:
    """Return whether a path is an index, as GPT-J's original trainer reads."""
    return path.suffix == INDEX_SUFFIX and path.is_file()


def listed_records(index: Path) -> list[Path]:
    """Return the record files that an index lists, one in each line.

    A path is relative to the current folder or, if no file is there, to the folder of the index.

    Raises:
        UsageError: a file does not exist, or is not on this machine.
        DataFault: a file is empty, or the index lists none.
    """
    found: list[Path] = []
    for line in index.read_text(encoding="utf-8", errors="replace").splitlines():
        if not (name := line.strip()):
            continue
        places = [Path(name), index.parent / name, index.parent / Path(name).name]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise UsageError(
                f"{index}: lists {name}, which is not a file here",
                hint=f"copy the file to {index.parent}, beside the index",
            )
        if not path.stat().st_size:
            raise DataFault(f"{path}: is empty, expected records")
        found.append(path)
    if not found:
        raise DataFault(f"{index}: lists no file, expected paths of {PATTERN}")
    return found


def hold_text(paths: Sequence[Path]) -> bool:
    """Return whether the records of the files are those of GPT-J's original trainer.

    Raises:
        DataFault: those of some files are, and those of others are not.
    """
    kinds: dict[bool, Path] = {}
    for path in paths:
        for _, offset, data in read_records(path, max_bytes=MAX_RECORD_BYTES):
            found = _parsed(data, f"{path}: record 0 at byte {offset}")
            kinds.setdefault(TEXT in found and INPUT_IDS not in found, path)
            break
    if len(kinds) > 1:
        raise DataFault(
            f"{kinds[True]} holds records of {TEXT}, {kinds[False]} of {', '.join(FEATURES)}; "
            "expected one kind in all files of a section"
        )
    return True in kinds


def check_files(folder: Path, paths: Sequence[Path]) -> None:
    """Check names and sizes of the record files of a folder against data_params.json.

    Raises:
        DataFault: a file is missing, unlisted, empty or of another size; with both counts.
    """
    restore = "restore the file, or make the records again"
    stated = stated_files(folder)
    found = {p.name: p for p in paths}
    for name in stated or ():
        if name not in found:
            assert stated
            raise DataFault(
                f"{folder / name}: missing; {DATA_PARAMS_FILE} states {_total(stated)}, found "
                f"{len(found.keys() & stated.keys())}",
                hint=restore,
            )
    for name, path in found.items():
        size = path.stat().st_size
        if not size:
            raise DataFault(f"{path}: is empty, expected records", hint=restore)
        if stated is None:
            continue
        if name not in stated:
            raise DataFault(
                f"{path}: is not one of the {_total(stated)} that {DATA_PARAMS_FILE} states",
                hint="move it to a folder of its own, and list both folders in data_dir",
            )
        if size != (expected := stated[name]).bytes:
            # HDF5 records have no checksums, so a count of them could be wrong too.
            count = f"{count_records([path])} examples in " if path.match(PATTERN) else ""
            raise DataFault(
                f"{path}: holds {count}{size} bytes, {DATA_PARAMS_FILE} states {expected.examples} "
                f"examples in {expected.bytes}",
                hint=restore,
            )


def _total(stated: Mapping[str, RecordFileFacts]) -> str:
    return f"{len(stated)} files with {sum(f.examples for f in stated.values())} examples"


def count_records(paths: Iterable[Path], *, enough: int | None = None) -> int:
    """Count the records of the files, from data_params.json or else by reading.

    Args:
        paths: record files.
        enough: count at which reading stops; None reads all files.

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
            count += sum(1 for _ in islice(read_records(path, max_bytes=MAX_RECORD_BYTES), left))
    return count


def framed(data: bytes) -> bytes:
    """Return a record as a TFRecord file stores it."""
    head = len(data).to_bytes(8, "little")
    crcs = (_CRC.pack(masked(crc32c(part))) for part in (head, data))
    return b"".join((head, next(crcs), data, next(crcs)))


class RecordWriter:
    """Writes one TFRecord file.

    Args:
        path: path of the file, which must not exist.
        compress: whether to compress the file with gzip.

    Raises:
        OSError: the file exists, or writing fails.
    """

    def __init__(self, path: Path, *, compress: bool = False) -> None:
        self._raw = path.open("xb")
        self._file: BinaryIO = self._raw
        if compress:
            # Without name and time, so that the same records give the same file.
            packed = gzip.GzipFile("", "wb", _GZIP_LEVEL, self._raw, mtime=0)
            self._file = cast(BinaryIO, packed)

    def write(self, block: np.ndarray) -> None:
        """Append a block of examples, int32 of shape (examples, 3, tokens)."""
        self._file.write(b"".join(framed(data) for data in serialize(block)))

    def close(self) -> None:
        """Close the file and sync it to the disk."""
        if self._file is not self._raw:
            self._file.close()
        self._raw.flush()
        os.fsync(self._raw.fileno())
        self._raw.close()

    def discard(self) -> None:
        """Close the file without completing it."""
        self._raw.close()


def is_compressed(path: Path) -> bool:
    """Return whether the content of a file, not its name, says that gzip compressed it."""
    with path.open("rb") as f:
        return f.read(len(GZIP_MAGIC)) == GZIP_MAGIC


def read_records(path: Path, *, max_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset in the uncompressed file, and data of each record.

    Raises:
        DataFault: a checksum is wrong, the file ends inside a record, or a record claims more
            than `max_bytes`; with file, record and offset.
    """
    with gzip.open(path) if is_compressed(path) else path.open("rb", _BUFFER) as f:
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
    """Yield number and lists (int64) of each example, checked against the model.

    Args:
        path: record file.
        length: number of tokens per example; None accepts that of the first example.
        vocab_size: upper bound of ids, exclusive.

    Raises:
        DataFault: a record is invalid; with file, number and feature.
    """
    for number, offset, data in read_records(path, max_bytes=largest_record(length)):
        place = f"{path}: record {number} at byte {offset}"
        example = parse_example(data, length=length, vocab_size=vocab_size, place=place)
        length = len(example[FEATURES[0]])
        yield number, example


def largest_record(length: int | None) -> int:
    """Return the size limit in bytes of records of `length` tokens, or of an unknown number."""
    # Feature names and varints of at most 10 bytes cannot make a larger record.
    return max(max_bytes(length), 1 << 20) if length else MAX_RECORD_BYTES


def parse_example(
    data: bytes, *, length: int | None, vocab_size: int, place: str
) -> dict[str, np.ndarray]:
    """Return the lists of a serialized example, int64, checked against the model.

    Args:
        data: the example.
        length: number of tokens; None accepts any.
        vocab_size: upper bound of ids, exclusive.
        place: where the record stands, for errors.

    Raises:
        DataFault: the record is invalid; with `place` and the feature.
    """
    example = of_text(_parsed(data, place))
    length = length or len(example.get(FEATURES[0], ())) or 1
    check_example(example, length, vocab_size, place)
    return example


def _parsed(data: bytes, place: str) -> dict[str, np.ndarray]:
    try:
        return parse(data)
    except ValueError as e:
        raise DataFault(f"{place}: is not a tf.train.Example: {e}") from None


def check_records(
    paths: Sequence[Path], *, length: int, vocab_size: int, only_first: bool = False
) -> None:
    """Check records against the model.

    Args:
        paths: record files.
        length: number of tokens per example, max_sequence_length.
        vocab_size: upper bound of ids, exclusive.
        only_first: check only the first record of each file.

    Raises:
        DataFault: a record is invalid; with file, number and feature.
    """
    for path in paths:
        for _ in read_examples(path, length=length, vocab_size=vocab_size):
            if only_first:
                break


def check_example(
    example: Mapping[str, np.ndarray], length: int, vocab_size: int, place: str
) -> None:
    """Check the lists of one example against the model.

    Raises:
        DataFault: a list is missing or invalid; with `place` and the feature.
    """
    for name in FEATURES:
        if name not in example:
            raise DataFault(
                f"{place}: has no {name}, expected {', '.join(FEATURES)}; it has "
                f"{', '.join(sorted(example)) or 'no features'}",
                hint="these are records of another program; " + DATA_HINT,
            )
        values = example[name]
        if len(values) != length:
            raise DataFault(
                f"{place}: {name} has {len(values)} tokens, expected max_sequence_length = "
                f"{length}",
                hint=f"set max_sequence_length to {len(values)} in the section that names the "
                "records, train_input or eval_input, or make the records again",
            )
        top = 2 if name == INPUT_MASK else vocab_size
        if values.min() < 0 or values.max() >= top:
            bad = int(values[(values < 0) | (values >= top)][0])
            raise DataFault(f"{place}: {name} holds {bad}, expected 0 to {top - 1}")
