"""The TensorFlow V2 checkpoint bundle, read and written without TensorFlow.

The files `PREFIX.data-0000i-of-0000n` hold the tensors' little-endian row-major bytes. The file
`PREFIX.index` is a LevelDB table from each tensor's name to the place of its bytes and their masked
crc32c.
Format: tensorflow/core/protobuf/tensor_bundle.proto, and `leveldb_table`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from crc32c import crc32c

from gptj_convert.files.output_file import OutputFile
from gptj_convert.files.ranged_file import DOWNLOAD_HINT, RangedFile
from gptj_convert.formats.containers.layout import FileLayout, Layout
from gptj_convert.formats.containers.leveldb_table import (
    FOOTER_BYTES,
    TableError,
    masked,
    read_table,
    table_bytes,
)
from gptj_convert.formats.containers.protobuf import (
    WireError,
    as_fixed32,
    as_message,
    as_number,
    encode_field,
    encode_fixed32,
    read_fields,
)
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, raw_bytes

#: Canonical name of each value of TensorFlow's enum DataType.
DTYPES = {
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    9: "int64",
    10: "bool",
    14: "bfloat16",
    19: "float16",
}
_CODES = {name: code for code, name in DTYPES.items()}

#: Limits on an index. With optimizer state, a GPT-J of 28 blocks has 855 tensors in 130 kB.
MAX_INDEX_BYTES = 4 * 2**20
MAX_TENSORS = 2**14
MAX_DIMENSIONS = 8
MAX_SHARDS = 100_000


def index_path(prefix: Path) -> Path:
    """Return the path of a bundle's index."""
    return prefix.with_name(prefix.name + ".index")


def data_path(prefix: Path, shard: int = 0, shards: int = 1) -> Path:
    """Return the path of one of a bundle's data files."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")


@dataclass(frozen=True, slots=True)
class Entry:
    """Place of one tensor's bytes."""

    info: TensorInfo
    shard: int
    offset: int
    crc: int
    """Masked crc32c of the bytes."""


class BundleSource:
    """Tensors of one bundle, as a `gptj_model.source.TensorSource`.

    Args:
        prefix: path of the files without their suffixes.

    Raises:
        FileFault: the index is corrupt, or a data file is missing or shorter than the index
            states.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._index = index_path(prefix)
        self._shards: list[RangedFile] = []
        shards, self.entries = _read_index(self._index)
        self.tensors: dict[str, TensorInfo] = {n: e.info for n, e in self.entries.items()}
        try:
            for i in range(shards):
                self._shards.append(RangedFile(data_path(prefix, i, shards)))
            self._check_extents()
        except BaseException:
            self.close()
            raise

    @property
    def files(self) -> list[Path]:
        """Index and data files."""
        return [self._index, *(shard.path for shard in self._shards)]

    def _check_extents(self) -> None:
        for name, entry in self.entries.items():
            if not 0 <= entry.shard < len(self._shards):
                raise FileFault(
                    f"{self._index}: tensor {name!r} is in data file {entry.shard}, "
                    f"but there are {len(self._shards)}"
                )
            file = self._shards[entry.shard]
            end = entry.offset + entry.info.nbytes
            if end > file.size:
                raise FileFault(
                    f"{file.path}: has {file.size} bytes, tensor {name!r} needs "
                    f"bytes {entry.offset} to {end}",
                    hint=DOWNLOAD_HINT,
                )

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        entry = self.entries[name]
        self._shards[entry.shard].read_into(entry.offset + offset, buffer, f"tensor {name!r}")

    def close(self) -> None:
        """Close the data files."""
        for shard in self._shards:
            shard.close()


def bundle_layout(prefix: str, tensors: Mapping[str, TensorInfo]) -> Layout:
    """Return the layout of a new bundle with one data file and the tensors sorted by name."""
    ordered = {name: tensors[name] for name in sorted(tensors)}
    begins = accumulate((info.nbytes for info in ordered.values()), initial=0)
    places = dict(zip(ordered, begins, strict=False))

    def index(checksums: Mapping[str, int]) -> dict[str, bytes]:
        entries = {
            name: Entry(info, 0, places[name], masked(checksums[name]))
            for name, info in ordered.items()
        }
        return {index_path(Path(prefix)).name: _index_bytes(entries)}

    return Layout(ordered, (FileLayout(data_path(Path(prefix)).name, tuple(ordered)),), index)


def write_bundle(prefix: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays as a bundle, durably.

    Args:
        prefix: path of the files without their suffixes.
        tensors: values by name.

    Raises:
        FileFault: a file exists, or the disk is full.
    """
    infos = {name: TensorInfo(a.dtype.name, a.shape) for name, a in tensors.items()}
    write_tensors(prefix, infos, tensors.__getitem__)


def write_tensors(
    prefix: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray]
) -> None:
    """Write a bundle durably, one tensor at a time.

    Args:
        prefix: path of the files without their suffixes.
        tensors: tensors of the bundle.
        read: function that returns the values of a tensor.

    Raises:
        FileFault: a file exists, or the disk is full.
    """
    with closing(BundleWriter(prefix, tensors)) as writer:
        for name in writer.tensors:
            writer.append(name, read(name))
        writer.finish()


class BundleWriter:
    """Writer of a bundle that accepts the tensors in any order, and the parts of each in order.

    Args:
        prefix: path of the files without their suffixes.
        tensors: tensors of the bundle.

    Raises:
        FileFault: a file exists, or the disk is full.
    """

    def __init__(self, prefix: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._prefix = prefix
        # Large tensors first: they then begin at offsets that allow direct writes.
        self.tensors = dict(sorted(tensors.items(), key=lambda t: -t[1].nbytes))
        """Tensors of the bundle, in the order of the data file."""
        *begins, self._end = accumulate((t.nbytes for t in self.tensors.values()), initial=0)
        self.begins = dict(zip(self.tensors, begins, strict=True))
        """Offset of each tensor in the data file, in bytes."""
        self.written = dict.fromkeys(self.tensors, 0)
        """Number of bytes of each tensor that have been written."""
        self._checksums = dict.fromkeys(self.tensors, 0)
        self._output = OutputFile(data_path(prefix), self._end)

    def append(self, name: str, values: np.ndarray) -> None:
        """Write the next elements of a tensor, any number of them, in its dtype."""
        raw = raw_bytes(np.ascontiguousarray(values))
        self._output.write(self.begins[name] + self.written[name], raw)
        self._checksums[name] = crc32c(raw, self._checksums[name])
        self.written[name] += len(raw)

    def finish(self, more: Mapping[str, np.ndarray] | None = None) -> None:
        """Flush the data to the device, then write the index, durably.

        Args:
            more: additional small tensors, which are written behind the others.
        """
        for name, values in (more or {}).items():
            self.tensors[name] = TensorInfo(values.dtype.name, values.shape)
            self.begins[name], self.written[name], self._checksums[name] = self._end, 0, 0
            self.append(name, values)
            self._end += values.nbytes
        assert self.written == {name: info.nbytes for name, info in self.tensors.items()}
        self._output.sync()
        entries = {
            name: Entry(self.tensors[name], 0, self.begins[name], masked(self._checksums[name]))
            for name in sorted(self.tensors)
        }
        content = _index_bytes(entries)
        with closing(OutputFile(index_path(self._prefix), len(content))) as output:
            output.write(0, memoryview(content))
            output.sync()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._output.close()


class _BundleError(ValueError):
    """Broken rule of the bundle's index; the text says which one."""


def _read_index(path: Path) -> tuple[int, dict[str, Entry]]:
    """Read the number of data files, and the entries by tensor name."""
    file = RangedFile(path)
    try:
        if not FOOTER_BYTES <= file.size <= MAX_INDEX_BYTES:
            raise FileFault(
                f"{path}: has {file.size} bytes, expected {FOOTER_BYTES} to {MAX_INDEX_BYTES} "
                "(is this the .index of a TensorFlow checkpoint?)"
            )
        table = memoryview(file.read(0, file.size, "the index"))
    finally:
        file.close()
    try:
        pairs = read_table(table)
        key, header = next(pairs, (None, None))
        if header is None or key != b"":
            raise _BundleError("it does not begin with the bundle's header")
        shards = _parse_header(header)
        entries: dict[str, Entry] = {}
        for key, value in pairs:
            if len(entries) == MAX_TENSORS:
                raise _BundleError(f"it names more than {MAX_TENSORS} tensors")
            entries[key.decode("utf-8")] = _parse_entry(value)
        return shards, entries
    except UnicodeDecodeError:
        raise FileFault(f"{path}: index is corrupt: a tensor's name is not UTF-8") from None
    except (_BundleError, TableError, WireError) as e:
        raise FileFault(f"{path}: index is corrupt: {e}", hint=DOWNLOAD_HINT) from None


def _parse_header(data: memoryview) -> int:
    """Return the number of data files that a BundleHeaderProto states."""
    shards = 0
    for field, kind, content in read_fields(data):
        if field == 1:
            shards = as_number(kind, content)
        elif field == 2 and as_number(kind, content) != 0:
            raise _BundleError("the tensors are big-endian")
    if not 1 <= shards <= MAX_SHARDS:
        raise _BundleError(f"it names {shards} data files")
    return shards


def _parse_entry(data: memoryview) -> Entry:
    """Return what a BundleEntryProto states, if it is plausible."""
    code = shard = offset = size = crc = 0
    shape: tuple[int, ...] = ()
    for field, kind, content in read_fields(data):
        if field == 1:
            code = as_number(kind, content)
        elif field == 2:
            shape = _parse_shape(as_message(kind, content))
        elif field == 3:
            shard = as_number(kind, content)
        elif field == 4:
            offset = as_number(kind, content)
        elif field == 5:
            size = as_number(kind, content)
        elif field == 6:
            crc = as_fixed32(kind, content)
        elif field == 7:
            raise _BundleError("a tensor is stored in slices, which GPT-J checkpoints are not")
    if code not in DTYPES:
        raise _BundleError(f"a tensor has dtype {code}, expected one of {sorted(DTYPES)}")
    info = TensorInfo(DTYPES[code], shape)
    # An empty tensor is checked, too: numpy has no array of such a shape.
    if math.prod(max(n, 1) for n in shape) * NUMPY[info.dtype].itemsize >= 2**63:
        raise _BundleError(f"a tensor's shape {list(shape)} overflows")
    if info.nbytes != size:
        raise _BundleError(f"a tensor of {info.dtype} {list(shape)} claims {size} bytes")
    if offset >= 2**63:
        raise _BundleError(f"a tensor begins at byte {offset}")
    return Entry(info, shard, offset, crc)


def _parse_shape(data: memoryview) -> tuple[int, ...]:
    """Return the sizes that a TensorShapeProto states."""
    shape: list[int] = []
    for field, kind, content in read_fields(data):
        if field != 2:
            continue
        size = 0
        for inner, inner_kind, number in read_fields(as_message(kind, content)):
            if inner == 1:
                size = as_number(inner_kind, number)
        if size >= 2**63:
            raise _BundleError("a tensor has a negative size")
        if len(shape) == MAX_DIMENSIONS:
            raise _BundleError(f"a tensor has more than {MAX_DIMENSIONS} dimensions")
        shape.append(size)
    return tuple(shape)


def _index_bytes(entries: Mapping[str, Entry]) -> bytes:
    """Return the content of an index; the entries are in the order of their names."""
    header = encode_field(1, 1) + encode_field(3, encode_field(1, 1))
    pairs = [(name.encode(), _entry_bytes(entry)) for name, entry in entries.items()]
    return table_bytes([(b"", header), *pairs])


def _entry_bytes(entry: Entry) -> bytes:
    dims = b"".join(encode_field(2, encode_field(1, size)) for size in entry.info.shape)
    return (
        encode_field(1, _CODES[entry.info.dtype])
        + encode_field(2, dims)
        + (encode_field(4, entry.offset) if entry.offset else b"")
        + encode_field(5, entry.info.nbytes)
        + encode_fixed32(6, entry.crc)
    )
