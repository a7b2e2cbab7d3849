"""Read the documents of source files one after another, in bounded memory.

Every problem names its place, `FILE:LINE`. A document that is longer than `LONG` bytes is read in
pieces, and it is read twice, so that nothing of a damaged document is used.
"""

from __future__ import annotations

import codecs
import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptj_model.errors import DataFault
from runner.data.making.long_line import Damaged, LongLine
from runner.data.making.pieces import pieces

#: Size in bytes from which a document is read in pieces, and the size of a piece.
LONG = 8 * 2**20
PIECE = 2**19
#: Largest window of a zstandard frame in bytes, as a power of 2.
_ZSTD_WINDOW_LOG = 27

JSON_LINES = (".jsonl", ".json")
TEXTS = (".txt",)
PARQUET = (".parquet",)
BINARY = (".bin",)
COMPRESSED = (".gz", ".zst", ".zstd")

TRAIN, VALIDATION, TEST = "train", "val", "test"
_SPLIT = re.compile(r"(?:(train)|(val|valid|validation|dev)|(test))(?![a-z])", re.IGNORECASE)


class Form(Enum):
    """Encoding of a document's bytes."""

    JSON = "an object"
    TEXT = "UTF-8"
    EXAMPLE = "a tf.train.Example"


@dataclass(frozen=True, slots=True)
class Raw:
    """A document, or a piece of one."""

    data: bytes
    form: Form
    path: str
    place: int
    """Line of the document, from 1; or number of its record or row, from 0."""
    more: bool = False
    """Whether the document continues in the next item."""

    @property
    def where(self) -> str:
        """Place of the document, as error messages show it."""
        return f"{self.path}:{self.place}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A malformed document."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How documents are read from files."""

    columns: tuple[str, ...] = ("text",)
    """Columns to read from a JSON object or a row of a table. Each entry may list alternatives
    separated by `|`, as in `highlights|summary`, of which the first that exists is read."""
    whole_files: bool = False
    """Read every file as one document; only compression is inferred from its name."""
    spool: Path
    """Folder for documents that are too long for memory."""


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
            inside = {p for pattern in patterns for p in source.rglob(pattern) if p.is_file()}
            for path in sorted(inside):
                found.setdefault(path, path.relative_to(source))
        else:
            raise DataFault(f"{source}: not found, expected a file or a folder")
    if not found:
        raise DataFault(
            f"{', '.join(map(str, sources))}: holds no file that matches {', '.join(patterns)}",
            hint="name the files, or see `gptj data --help` for the formats that can be read",
        )
    return list(found.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Source files of one set of records."""

    files: tuple[Path, ...]
    folder: str = ""
    """Folder of the output that the records go to."""
    split: str = ""
    """Split according to the files' names: train, val, test, or "" if unknown."""


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


def read(
    paths: Iterable[Path], reading: Reading, tell: Callable[[int], None] = lambda n: None
) -> Iterator[Raw | Problem]:
    """Yield every document of the files, in order.

    Args:
        paths: files, whose suffixes determine their formats.
        reading: how documents are read from the files.
        tell: called with the number of bytes that have been read.

    Raises:
        DataFault: a file cannot be read at all, or its format is unknown.
    """
    before = 0
    for path in paths:
        reader = _reader(path, reading)
        done = 0
        for item, done in reader:
            yield item
            tell(before + done)
        before += path.stat().st_size
        tell(before)


def _reader(path: Path, reading: Reading) -> Iterator[tuple[Raw | Problem, int]]:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in COMPRESSED]
    kind = suffixes[-1] if suffixes else ""
    if reading.whole_files or kind in TEXTS:
        return _whole(path)
    if kind in JSON_LINES:
        return _lines(path, reading)
    if kind in PARQUET:
        return _rows(path, reading)
    if kind in BINARY:
        return _binary(path)
    known = ", ".join((*JSON_LINES, *TEXTS, *PARQUET, *BINARY))
    raise DataFault(
        f"{path}: unknown format, expected a name that ends in one of {known}, "
        f"optionally followed by one of {', '.join(COMPRESSED)} for JSON lines and text"
    )


class _Stream:
    """A file, decompressed as it is read, with the position in the compressed file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw = path.open("rb")
        suffix = path.suffix.lower()
        if suffix == ".gz":
            self.file = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw, mode="rb"))
        elif suffix in (".zst", ".zstd"):
            from backports.zstd import DecompressionParameter, ZstdFile

            options = {int(DecompressionParameter.window_log_max): _ZSTD_WINDOW_LOG}
            self.file = cast(BinaryIO, ZstdFile(self._raw, options=options))
        else:
            self.file = self._raw

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self.file.close()
        self._raw.close()


def _damages() -> tuple[type[Exception], ...]:
    """Return what decompressors raise at damaged data; other exceptions come from the disk."""
    from backports.zstd import ZstdError

    return (EOFError, zlib.error, gzip.BadGzipFile, ZstdError)


def _lines(path: Path, reading: Reading) -> Iterator[tuple[Raw | Problem, int]]:
    number = 0
    with closing(_Stream(path)) as stream:
        try:
            while line := stream.file.readline(LONG):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) >= LONG and not line.endswith(b"\n"):
                    for item in _long_line(stream.file, line, number, path, reading):
                        yield item, stream.tell()
                elif not line.isspace():
                    yield Raw(line, Form.JSON, str(path), number), stream.tell()
        except _damages() as e:
            what = f"{_damage(e)}; the last good line is {number}"
            yield Problem(f"{path}:{number + 1}", what), stream.tell()


def _damage(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the compressed file is cut: it ends inside a frame"
    return f"the compressed file is damaged here: {error}"


def _long_line(
    file: BinaryIO, begun: bytes, number: int, path: Path, reading: Reading
) -> Iterator[Raw | Problem]:
    with closing(LongLine(file, begun, reading.spool, PIECE)) as line:
        key, *others = reading.columns
        if others:
            yield Problem(f"{path}:{number}", f"has more than {LONG} bytes")
            return
        try:
            texts = line.strings(key)
            for _ in texts():
                pass
        except Damaged as e:
            yield Problem(f"{path}:{number}", str(e))
            return
        yield from _in_pieces(texts(), str(path), number)


def _in_pieces(texts: Iterable[str], path: str, place: int) -> Iterator[Raw]:
    last: str | None = None
    for text in pieces(texts, PIECE):
        if last is not None:
            yield Raw(last.encode(), Form.TEXT, path, place, more=True)
        last = text
    yield Raw((last or "").encode(), Form.TEXT, path, place)


def _whole(path: Path) -> Iterator[tuple[Raw | Problem, int]]:
    with closing(_Stream(path)) as stream:
        try:
            data = stream.file.read(LONG)
            if len(data) < LONG:
                yield Raw(data, Form.TEXT, str(path), 1), stream.tell()
                return
        except _damages() as e:
            yield Problem(f"{path}:1", _damage(e)), stream.tell()
            return
    for item in _long_text(path, 1, lambda: _blocks(path)):
        yield item, 0


def _blocks(path: Path) -> Iterator[bytes]:
    with closing(_Stream(path)) as stream:
        while block := stream.file.read(PIECE):
            yield block


def _long_text(
    path: Path, place: int, blocks: Callable[[], Iterable[bytes]], *, in_lines: bool = True
) -> Iterator[Raw | Problem]:
    line = place
    try:
        for text in _decoded(blocks()):
            line += text.count("\n") if in_lines else 0
    except UnicodeDecodeError as e:
        line += bytes(e.object[: e.start]).count(b"\n") if in_lines else 0
        yield Problem(f"{path}:{line}", not_utf8(e))
        return
    except _damages() as e:
        yield Problem(f"{path}:{line}", _damage(e))
        return
    yield from _in_pieces(_decoded(blocks()), str(path), place)


def _decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in blocks:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def not_utf8(error: UnicodeDecodeError) -> str:
    """Describe the byte that is not UTF-8."""
    return f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8"


def _rows(path: Path, reading: Reading) -> Iterator[tuple[Raw | Problem, int]]:
    import orjson
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            names = [_column(group, file.schema_arrow.names, path) for group in reading.columns]
            for name in names:
                kind = file.schema_arrow.field(name).type
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                    raise DataFault(f"{path}: column {name!r} is of type {kind}, expected strings")
            number, total = 0, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=64, columns=names):
                columns = [batch.column(name) for name in names]
                for n in range(len(batch)):
                    done = size * number // total
                    # An empty string has no buffer, just as null has none.
                    buffers = [c[n].as_buffer() or b"" for c in columns]
                    nulls = [x for x, c in zip(names, columns, strict=True) if not c[n].is_valid]
                    if nulls:
                        what = f"{nulls[0]!r} is null, expected a string"
                        yield Problem(f"{path}:{number}", what), done
                    elif len(names) > 1:
                        row = dict(zip(names, (c[n].as_py() for c in columns), strict=True))
                        yield Raw(orjson.dumps(row), Form.JSON, str(path), number), done
                    elif len(buffers[0]) < LONG:
                        yield Raw(bytes(buffers[0]), Form.TEXT, str(path), number), done
                    else:
                        blocks = _slicing(memoryview(buffers[0]))
                        for item in _long_text(path, number, blocks, in_lines=False):
                            yield item, done
                    number += 1
    except (pa.ArrowException, UnicodeDecodeError) as e:
        raise DataFault(f"{path}: cannot be read as parquet: {e}") from None


def _slicing(data: memoryview) -> Callable[[], Iterator[bytes]]:
    return lambda: (bytes(data[at : at + PIECE]) for at in range(0, len(data), PIECE))


def _column(group: str, names: Sequence[str], path: Path) -> str:
    for name in group.split("|"):
        if name in names:
            return name
    raise DataFault(
        f"{path}: has no column {group.replace('|', ' or ')}, found {', '.join(map(repr, names))}",
        hint="name the columns with the options of the command; see its --help",
    )


def pick(values: Mapping[str, Any], group: str) -> Any:
    """Return the value of the first name of a group that exists.

    Raises:
        KeyError: none of the names exists; its argument lists them for people.
    """
    for name in group.split("|"):
        if name in values:
            return values[name]
    raise KeyError(group.replace("|", " or "))


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
            if not 0 <= length < LONG:
                what = f"claims {length} bytes, expected 0 to {LONG - 1}"
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
