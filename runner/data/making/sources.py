"""Read the documents of source files one after another, in bounded memory.

Every problem names its place, `FILE:LINE`. A document that is longer than `LONG` bytes is read in
pieces, and it is read twice, so that nothing of a damaged document is used.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from gptj_model.errors import DataFault
from runner.data.making.documents import document
from runner.data.making.documents.document import (
    Form,
    Problem,
    Raw,
    Reading,
    damage,
    too_long,
    where,
)
from runner.data.making.documents.json_lists import Elements, begins_list
from runner.data.making.documents.streams import COMPRESSED, Stream, damages, in_words, misnamed
from runner.data.making.documents.tables import read_arrow, read_csv, read_parquet
from runner.data.making.documents.texts import in_pieces, read_whole
from runner.data.making.long_line import Damaged, LongLine
from runner.data.remote.path import files_inside

JSON = ".json"
JSON_LINES = (".jsonl", JSON)
TEXTS = (".txt",)
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet",)
ARROW = (".arrow",)
BINARY = (".bin",)

#: Names of files that describe a data set, and are not part of it.
_DESCRIPTIONS = (
    "data_params.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "state.json",
)
#: The description of a folder that `datasets.save_to_disk` has written.
_STATE_FILE = "state.json"

TRAIN, VALIDATION, TEST = "train", "val", "test"
#: Byte ranges of files of which only the lines are read that begin there, as (begin, end).
Ranges = Mapping[Path, tuple[int, int]]
_WHOLE: Ranges = {}

_SPLIT = re.compile(r"(?:(train)|(val|valid|validation|dev)|(test))(?![a-z])", re.IGNORECASE)


def find_source_files(sources: Sequence[Path], patterns: Sequence[str]) -> list[tuple[Path, Path]]:
    """Find the given files, and the files that match a pattern in the given folders, recursively.

    Returns:
        Each file, sorted within its source, with its path relative to the source.

    Raises:
        DataFault: a source does not exist, or no file matches.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        if source.is_file():
            found.setdefault(source, Path(source.name))
        elif source.is_dir():
            inside = files_inside(source, patterns)
            rows = any(pattern.endswith(ARROW) for pattern in patterns)
            for path in sorted(_of_data_sets(inside) if rows else inside):
                found.setdefault(path, path.relative_to(source))
        else:
            raise DataFault(f"{source}: not found, expected a file or a folder")
    if not found:
        shown = ", ".join(p for p in patterns if not p.endswith(tuple(COMPRESSED)))
        raise DataFault(
            f"{', '.join(map(str, sources))}: holds no file that matches {shown or patterns[0]}",
            hint="name the files, or see `gptj data --help` for the formats that can be read",
        )
    return list(found.items())


def _of_data_sets(paths: set[Path]) -> set[Path]:
    """Return the paths without descriptions of data sets and Arrow files that these leave out.

    Raises:
        DataFault: a file that a description lists is missing, or the description is damaged.
    """
    kept = {p for p in paths if p.name not in _DESCRIPTIONS and p.name[0] != "."}
    for folder in {p.parent for p in kept if p.suffix in ARROW}:
        if (state := folder / _STATE_FILE).is_file():
            listed = _listed(state)
            for path in listed:
                if not path.is_file():
                    raise DataFault(f"{path}: not found, but {state} lists it")
            # A cache of `datasets` may lie beside the files of the set.
            kept -= {p for p in kept if p.parent == folder and p.suffix in ARROW}
            kept |= listed
    return kept


def _listed(state: Path) -> set[Path]:
    try:
        values = json.loads(state.read_bytes())
        indices = values.get("_indices_files") or values.get("_indices_data_files")
        listed = {state.parent / Path(file["filename"]).name for file in values["_data_files"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataFault(
            f"{state}: lists no files, expected the description of `datasets.save_to_disk`"
        ) from None
    if indices:
        raise DataFault(
            f"{state}: the data set is a selection of its rows, which only `datasets` can read",
            hint="save it again after `flatten_indices()`",
        )
    return listed


def misnamed_files(paths: Iterable[Path]) -> list[str]:
    """Return a note on each file of text that is compressed in another way than its name says.

    Raises:
        DataFault: a file cannot be read.
    """
    tables = (*PARQUET, *ARROW, *BINARY)
    try:
        found = [misnamed(path) for path in paths if path.suffix.lower() not in tables]
    except OSError as e:
        raise DataFault(f"{e.filename}: cannot be read: {e.strerror}") from None
    return [note for note in found if note]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Source files of one set of records."""

    files: tuple[Path, ...]
    folder: str = ""
    """Folder of the output that the records go to."""
    split: str = ""
    """Split according to the files' names: train, val, test, or "" if unknown."""
    ranges: Ranges = field(default_factory=dict[Path, tuple[int, int]])
    """Ranges of the files of which another shard reads the rest; see `shards`."""

    @property
    def bytes(self) -> int:
        """Number of bytes to read."""
        return sum(_bytes(path, self.ranges) for path in self.files)


def by_split(found: Iterable[tuple[Path, Path]]) -> list[Part]:
    """Group files by the split that their names indicate, each split in a folder of its own.

    Files without a split belong to train if other files have one. A single part gets no folder.
    """
    splits: dict[str, list[Path]] = {}
    for path, relative in found:
        splits.setdefault(split_of(relative), []).append(path)
    if len(splits) > 1:
        unnamed = splits.pop("", [])
        if unnamed:
            splits[TRAIN] = sorted([*splits.get(TRAIN, []), *unnamed])
    if len(splits) == 1:
        ((split, files),) = splits.items()
        return [Part(files=tuple(files), split=split)]
    named = [s for s in (TRAIN, VALIDATION, TEST) if s in splits]
    return [Part(files=tuple(splits[s]), folder=s, split=s) for s in named]


def split_of(relative: Path) -> str:
    """Return the split that a file's or a folder's name indicates, or "" if none does."""
    for part in reversed(relative.parts):
        if match := _SPLIT.match(part):
            return (TRAIN, VALIDATION, TEST)[(match.lastindex or 1) - 1]
    return ""


def _bytes(path: Path, ranges: Ranges) -> int:
    begin, end = ranges.get(path) or (0, path.stat().st_size)
    return end - begin


def read(
    paths: Iterable[Path],
    reading: Reading,
    tell: Callable[[int], None] = lambda n: None,
    ranges: Ranges = _WHOLE,
) -> Generator[Raw | Problem, None, None]:
    """Yield every document of the files, in order.

    Args:
        paths: files, whose suffixes determine their formats.
        reading: how documents are read from the files.
        tell: called with the number of bytes that have been read.
        ranges: ranges of uncompressed files of lines that are not read whole.

    Raises:
        DataFault: a file cannot be read at all, or its format is unknown.
    """
    before = 0
    for path in paths:
        begin, end = ranges.get(path, (0, None))
        reader = _reader(path, reading) if end is None else _json(path, reading, begin, end)
        done = begin
        for item, done in reader:
            yield item
            tell(before + done - begin)
        before += _bytes(path, ranges)
        tell(before)


def _reader(path: Path, reading: Reading) -> Iterator[tuple[Raw | Problem, int]]:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in COMPRESSED]
    kind = suffixes[-1] if suffixes else ""
    if reading.whole_files or kind in TEXTS:
        return read_whole(path)
    if kind in JSON_LINES:
        return _json(path, reading, may_be_list=kind == JSON)
    if kind in DELIMITERS:
        return read_csv(path, delimiter=DELIMITERS[kind])
    if kind in PARQUET:
        return read_parquet(path, reading)
    if kind in ARROW:
        return read_arrow(path, reading)
    if kind in BINARY:
        return _binary(path)
    known = ", ".join((*JSON_LINES, *TEXTS, *DELIMITERS, *PARQUET, *ARROW, *BINARY))
    raise DataFault(
        f"{path}: unknown format, expected a name that ends in one of {known}, "
        f"optionally followed by one of {', '.join(COMPRESSED)} for text"
    )


def _json(
    path: Path,
    reading: Reading,
    begin: int = 0,
    end: int | None = None,
    *,
    may_be_list: bool = False,
) -> Iterator[tuple[Raw | Problem, int]]:
    number = 0
    with closing(Stream(path)) as stream:
        try:
            head = stream.begin()
            if may_be_list and begins_list(head):
                yield from _list(path, stream)
                return
            at = after = _seek_line(stream.file, begin)
            while (end is None or at < end) and (line := stream.file.readline(document.LONG)):
                number += 1
                if may_be_list and number == 1 and line.strip() == b"{":
                    raise Damaged("holds one object over several lines, expected a list of objects")
                if len(line) >= document.LONG and not line.endswith(b"\n"):
                    for item in _long_line(stream.file, line, number, after, path, reading):
                        yield item, stream.tell()
                elif not line.isspace():
                    yield Raw(line, Form.JSON, str(path), number, after=after), stream.tell()
                at = stream.tell()
        except Damaged as e:
            if not begin:  # the beginning of a file belongs to its first range
                yield damage(path, e), stream.tell()
        except damages() as e:
            what = f"{in_words(e)}; the last good line is {number}"
            yield Problem(f"{path}:{number + 1}", what), stream.tell()


def _seek_line(file: BinaryIO, begin: int) -> int:
    """Go to the first line that begins at an offset or after it, and return its offset."""
    if not begin:
        return 0  # whether a byte-order mark has been read or not
    file.seek(begin - 1)
    while (part := file.readline(document.PIECE)) and not part.endswith(b"\n"):
        pass
    return file.tell()


def _list(path: Path, stream: Stream) -> Iterator[tuple[Raw | Problem, int]]:
    blocks = iter(lambda: stream.file.read(document.PIECE), b"")
    elements = Elements(blocks, document.LONG)
    try:
        for line, data in elements:
            item = too_long(path, line) if data is None else Raw(data, Form.JSON, str(path), line)
            yield item, stream.tell()
    except damages() as e:
        yield Problem(f"{path}:{elements.line}", in_words(e)), stream.tell()


def _long_line(
    file: BinaryIO, begun: bytes, number: int, after: int, path: Path, reading: Reading
) -> Iterator[Raw | Problem]:
    with closing(LongLine(file, begun, reading.spool, document.PIECE)) as line:
        key, *others = reading.columns
        if others or reading.rows:
            yield too_long(path, number, after)
            return
        try:
            texts = line.strings(key)
            for _ in texts():
                pass
        except Damaged as e:
            yield Problem(where(path, number, after), str(e))
            return
        yield from in_pieces(texts(), str(path), number, after)


def _binary(path: Path) -> Iterator[tuple[Raw | Problem, int]]:
    """Yield records that consist of a length in 8 bytes and a tf.train.Example."""
    with path.open("rb") as file:
        number = offset = 0
        while head := file.read(8):
            where = f"{path}: record {number} at byte {offset}"
            if len(head) < 8:
                yield Problem(where, "the file ends inside its length"), offset
                return
            (length,) = struct.unpack("<q", head)
            if not 0 <= length < document.LONG:
                what = f"claims {length} bytes, expected 0 to {document.LONG - 1}"
                yield Problem(where, what), offset
                return
            data = file.read(length)
            if len(data) < length:
                what = f"the file ends inside it, {length - len(data)} bytes short"
                yield Problem(where, what), offset
                return
            offset += 8 + length
            yield Raw(data, Form.EXAMPLE, str(path), number), offset
            number += 1
