"""Documents in the rows of tables: parquet, Arrow and CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from gptj_model.errors import DataFault
from runner.data.making.documents import document
from runner.data.making.documents.document import Form, Problem, Raw, Reading, damage, too_long
from runner.data.making.documents.streams import Stream, damages, in_words
from runner.data.making.documents.texts import long_text
from runner.data.making.long_line import Damaged, names
from runner.data.remote.path import as_remote

#: First bytes of an Arrow file with an index; without them, it is a stream.
_ARROW_FILE = b"ARROW1"
#: Signs between the fields of tables whose names say otherwise.
_DELIMITERS = ";\t,|"
#: Number of rows that are read together.
_TOGETHER = 64

Documents = Iterator[tuple[Raw | Problem, int]]


def read_parquet(path: Path, reading: Reading) -> Documents:
    """Yield the rows of a parquet file.

    Raises:
        DataFault: it is not a parquet file, or lacks a column.
    """
    import pyarrow.parquet as pq

    size = path.stat().st_size
    source = path.open("rb") if as_remote(path) else path
    with _faults(path, "parquet"), pq.ParquetFile(source) as file:
        wanted = _wanted(path, file.schema_arrow, reading)
        number, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=_TOGETHER, columns=wanted):
            for item in _rows(path, batch, wanted, number, reading):
                yield item, size * number // total
                number += 1


def read_arrow(path: Path, reading: Reading) -> Documents:
    """Yield the rows of an Arrow file: a stream, which `datasets` writes, or a file with an index.

    Raises:
        DataFault: it is not an Arrow file, or lacks a column.
    """
    import pyarrow as pa

    with path.open("rb") as raw:
        has_index = raw.read(len(_ARROW_FILE)) == _ARROW_FILE
    number = 0
    # A file of Arrow's own: damage that asks for too much memory is then one of Arrow's errors.
    with _faults(path, "Arrow"), _arrow_file(path) as source:
        table = pa.ipc.open_file(source) if has_index else pa.ipc.open_stream(source)
        wanted = _wanted(path, table.schema, reading)
        for whole in _batches(table):
            # Arrow trusts the offsets in a file: damaged ones would end the process.
            whole.validate(full=True)
            for start in range(0, len(whole), _TOGETHER):
                batch = whole.slice(start, _TOGETHER)
                for item in _rows(path, batch, wanted, number, reading):
                    yield item, source.tell()
                number += len(batch)


def _arrow_file(path: Path) -> Any:
    import pyarrow as pa

    return pa.PythonFile(path.open("rb")) if as_remote(path) else pa.OSFile(str(path))


def _batches(table: Any) -> Iterator[Any]:
    if hasattr(table, "num_record_batches"):
        return (table.get_batch(n) for n in range(table.num_record_batches))
    return iter(table)


@contextmanager
def _faults(path: Path, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as e:
        raise DataFault(f"{path}: cannot be read as {kind}: {e}") from None
    except OSError as e:
        if e.errno is not None:
            raise
        raise DataFault(f"{path}: cannot be read as {kind}: {e}") from None


def _wanted(path: Path, schema: Any, reading: Reading) -> list[str]:
    """Return the names of the columns to read.

    Raises:
        DataFault: a column is missing, or does not hold strings.
    """
    import pyarrow as pa

    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    if reading.rows:
        # Dates, images and the like are no texts, and not all of them have a form in JSON.
        other = (pa.types.is_temporal, pa.types.is_decimal, *binary)
        return [f.name for f in schema if not any(is_other(f.type) for is_other in other)]
    wanted = [_column(group, schema.names, path) for group in reading.columns]
    for name in wanted:
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataFault(f"{path}: column {name!r} is of type {kind}, expected strings")
    return wanted


def _column(group: str, found: Sequence[str], path: Path) -> str:
    for name in group.split("|"):
        if name in found:
            return name
    raise DataFault(
        f"{path}: has no column {group.replace('|', ' or ')}, found {names(found)}",
        hint="name the columns with the options of the command; see its --help",
    )


def _rows(
    path: Path, batch: Any, wanted: Sequence[str], number: int, reading: Reading
) -> Iterator[Raw | Problem]:
    """Yield the rows of a batch, which begins at a number."""
    columns = [batch.column(name) for name in wanted]
    for n in range(len(batch)):
        if reading.rows or len(wanted) > 1:
            yield _object(path, dict(zip(wanted, columns, strict=True)), n, number, reading)
        elif not columns[0][n].is_valid:
            yield _null(path, wanted[0], number)
        else:
            # An empty string has no buffer.
            data = columns[0][n].as_buffer() or b""
            if len(data) < document.LONG:
                yield Raw(bytes(data), Form.TEXT, str(path), number)
            else:
                yield from long_text(path, number, _slicing(memoryview(data)), in_lines=False)
        number += 1


def _object(
    path: Path, columns: dict[str, Any], n: int, number: int, reading: Reading
) -> Raw | Problem:
    import orjson

    nulls = [name for name, column in columns.items() if not column[n].is_valid]
    if nulls and not reading.rows:
        return _null(path, nulls[0], number)
    try:
        row = {name: column[n].as_py() for name, column in columns.items()}
        data = orjson.dumps(row, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    except (ValueError, OverflowError, TypeError, LookupError) as e:
        return Problem(f"{path}:{number}", f"holds a value that cannot be read: {e}")
    if len(data) > document.LONG and reading.rows:
        return too_long(path, number)
    return Raw(data, Form.JSON, str(path), number)


def _plain(value: Any) -> str | None:
    """Return a value that JSON lacks as text, or null: bytes, such as images, are no text."""
    return None if isinstance(value, bytes) else str(value)


def _null(path: Path, name: str, number: int) -> Problem:
    return Problem(f"{path}:{number}", f"{name!r} is null, expected a string")


def _slicing(data: memoryview) -> Callable[[], Iterator[bytes]]:
    step = document.PIECE
    return lambda: (bytes(data[at : at + step]) for at in range(0, len(data), step))


def read_csv(path: Path, *, delimiter: str) -> Documents:
    """Yield the rows of a CSV file as JSON objects, whose keys the first row names.

    Raises:
        DataFault: the first row is no header.
    """
    import orjson

    csv.field_size_limit(document.LONG)
    line = 1
    with closing(Stream(path)) as stream:
        try:
            stream.begin()
            # Bytes that are not UTF-8 become surrogates, which orjson refuses row by row.
            lines = (raw.decode("utf-8", "surrogateescape") for raw in _bounded(stream))
            table = csv.reader(lines, delimiter=delimiter, strict=True)
            header = _header(path, table, delimiter)
            while header:
                line = table.line_num + 1
                try:
                    row = next(table, None)
                    if row is None:
                        return
                    if row:
                        data = orjson.dumps(_named(header, row))
                        yield Raw(data, Form.JSON, str(path), line), stream.tell()
                except csv.Error as e:
                    yield Problem(f"{path}:{line}", f"is not CSV: {e}"), stream.tell()
                except orjson.JSONEncodeError:
                    yield Problem(f"{path}:{line}", "is not UTF-8"), stream.tell()
                except Damaged as e:
                    yield Problem(f"{path}:{line}", str(e)), stream.tell()
        except Damaged as e:
            yield damage(path, e), stream.tell()
        except damages() as e:
            what = f"{in_words(e)}; the last good line is {line - 1}"
            yield Problem(f"{path}:{line}", what), stream.tell()


def _bounded(stream: Stream) -> Iterator[bytes]:
    number = 0
    while line := stream.file.readline(document.LONG):
        number += 1
        if len(line) >= document.LONG:
            raise Damaged(f"a line has more than {document.LONG} bytes", line=number - 1)
        yield line


def _header(path: Path, table: Any, delimiter: str) -> list[str]:
    try:
        header: list[str] = next(table, [])
    except csv.Error as e:
        raise DataFault(f"{path}:1: is not CSV: {e}") from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataFault(f"{path}:1: names {names(twice)} twice, expected a header of column names")
    other = next((sign for sign in _DELIMITERS if len(header) == 1 and sign in header[0]), None)
    if other:
        raise DataFault(
            f"{path}:1: has {other!r} between its fields, expected {delimiter!r}",
            hint="save the table with commas as .csv, or with tabs as .tsv",
        )
    return header


def _named(header: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise Damaged(f"has {len(row)} fields, expected {len(header)} as the header has")
    return dict(zip(header, row, strict=True))
