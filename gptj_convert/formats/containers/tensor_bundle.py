"""The TensorFlow V2 checkpoint bundle, read and written without TensorFlow.

`PREFIX.data-0000i-of-0000n` hold the tensors' little-endian row-major bytes. `PREFIX.index` is
a LevelDB table from tensor names to where their bytes are, with a masked crc32c for each.
Formats: tensorflow/core/protobuf/tensor_bundle.proto and leveldb's table_format.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from crc32c import crc32c

from gptj_convert.files.output_file import OutputFile
from gptj_convert.files.ranged_file import DOWNLOAD_HINT, RangedFile
from gptj_convert.formats.containers.layout import FileLayout, Layout
from gptj_convert.formats.containers.varint import encode_varint
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, raw_bytes

#: TensorFlow's dtype enum ↔ canonical names.
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

#: A GPT-J of 28 blocks with its optimizer's state needs 855 tensors and 130 kB.
MAX_INDEX_BYTES = 4 * 2**20
MAX_TENSORS = 2**14
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 8
MAX_SHARDS = 100_000
_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_BLOCK_SIZE = 4096
_RESTART_INTERVAL = 16


def index_path(prefix: Path) -> Path:
    """The index file of a bundle."""
    return prefix.with_name(prefix.name + ".index")


def data_path(prefix: Path, shard: int = 0, shards: int = 1) -> Path:
    """A data file of a bundle."""
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")


def masked(crc: int) -> int:
    """LevelDB's masking of a crc32c, so that a crc of data with a crc in it stays strong."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def unmasked(value: int) -> int:
    """The crc32c that `masked` gave this value."""
    rotated = (value - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor's bytes are."""

    info: TensorInfo
    shard: int
    offset: int
    crc: int
    """Masked crc32c of the bytes."""


class BundleSource:
    """The tensors of one bundle, as `gptj_model.source.TensorSource`.

    Raises:
        FileFault: the index is corrupt, or a data file is missing or shorter than it says.
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
        """The index and every data file."""
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
    """A new bundle with one data file, its tensors in the order of their names."""
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
    """Write arrays that are in memory as a bundle, durably.

    Raises:
        FileFault: the files exist, or the disk is full.
    """
    infos = {name: TensorInfo(a.dtype.name, a.shape) for name, a in tensors.items()}
    write_tensors(prefix, infos, tensors.__getitem__)


def write_tensors(
    prefix: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray]
) -> None:
    """Write a bundle durably, one tensor at a time.

    Args:
        prefix: of the files.
        tensors: what it will hold.
        read: gives the values of one.

    Raises:
        FileFault: the files exist, or the disk is full.
    """
    with closing(BundleWriter(prefix, tensors)) as writer:
        for name in writer.tensors:
            writer.append(name, read(name))
        writer.finish()


class BundleWriter:
    """A bundle while it is written: its tensors in any order, the parts of each one in order.

    Args:
        prefix: of the files.
        tensors: what it will hold.

    Raises:
        FileFault: the files exist, or the disk is full.
    """

    def __init__(self, prefix: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._prefix = prefix
        # Large ones first: they begin where a device takes them directly.
        self.tensors = dict(sorted(tensors.items(), key=lambda t: -t[1].nbytes))
        """What it will hold, in the order of the file."""
        *begins, self._end = accumulate((t.nbytes for t in self.tensors.values()), initial=0)
        self.begins = dict(zip(self.tensors, begins, strict=True))
        """Where each one is in the data file."""
        self.written = dict.fromkeys(self.tensors, 0)
        """How many bytes of each one are there."""
        self._checksums = dict.fromkeys(self.tensors, 0)
        self._output = OutputFile(data_path(prefix), self._end)

    def append(self, name: str, values: np.ndarray) -> None:
        """Write what follows of a tensor: any number of its elements, in its dtype."""
        raw = raw_bytes(np.ascontiguousarray(values))
        self._output.write(self.begins[name] + self.written[name], raw)
        self._checksums[name] = crc32c(raw, self._checksums[name])
        self.written[name] += len(raw)

    def finish(self, more: Mapping[str, np.ndarray] | None = None) -> None:
        """Make the data durable, then write the index, durably.

        Args:
            more: small tensors that were not known before; they go behind the others.
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


# The index: protocol buffers inside a LevelDB table.


def _read_index(path: Path) -> tuple[int, dict[str, Entry]]:
    """Number of data files, and the entries by tensor name."""
    file = RangedFile(path)
    try:
        if not _FOOTER <= file.size <= MAX_INDEX_BYTES:
            raise FileFault(
                f"{path}: has {file.size} bytes, expected {_FOOTER} to {MAX_INDEX_BYTES} "
                "(is this the .index of a TensorFlow checkpoint?)"
            )
        table = memoryview(file.read(0, file.size, "the index"))
    finally:
        file.close()
    try:
        pairs = _table_pairs(table)
        key, header = next(pairs, (None, None))
        if header is None or key != b"":
            raise _Corrupt("it does not begin with the bundle's header")
        shards = _parse_header(header)
        entries: dict[str, Entry] = {}
        for key, value in pairs:
            if len(entries) == MAX_TENSORS:
                raise _Corrupt(f"it names more than {MAX_TENSORS} tensors")
            entries[key.decode("utf-8")] = _parse_entry(value)
        return shards, entries
    except _Corrupt as e:
        raise FileFault(f"{path}: index is corrupt: {e}", hint=DOWNLOAD_HINT) from None
    except UnicodeDecodeError:
        raise FileFault(f"{path}: index is corrupt: a tensor's name is not UTF-8") from None


class _Corrupt(Exception):
    """A rule of the index format is broken."""


def _table_pairs(table: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    footer = table[-_FOOTER:]
    if struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise _Corrupt("its last 8 bytes are not the table's magic number")
    _, at = _varint(footer, 0)
    _, at = _varint(footer, at)
    index_handle = _handle(footer[at:])
    end, last = 0, None
    for _, handle in _block_pairs(_block(table, *index_handle)):
        # In order, as every writer has them: else few bytes could be read as any number.
        offset, size = _handle(handle)
        if offset < end:
            raise _Corrupt(f"the block at byte {offset} begins inside the one before it")
        end = offset + size
        for key, value in _block_pairs(_block(table, offset, size)):
            if last is not None and key <= last:
                raise _Corrupt("its names are not in order, or one occurs twice")
            yield key, value
            last = key


def _handle(data: memoryview) -> tuple[int, int]:
    offset, at = _varint(data, 0)
    size, _ = _varint(data, at)
    return offset, size


def _block(table: memoryview, offset: int, size: int) -> memoryview:
    end = offset + size
    if end + 5 > len(table):
        raise _Corrupt(f"a block at byte {offset} reaches beyond the end")
    if table[end] != 0:
        raise _Corrupt(f"the block at byte {offset} is compressed, which checkpoints are not")
    (stored,) = struct.unpack("<I", table[end + 1 : end + 5])
    if stored != masked(crc32c(table[offset : end + 1])):
        raise _Corrupt(f"checksum of the block at byte {offset} is wrong")
    return table[offset:end]


def _block_pairs(block: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    if len(block) < 4:
        raise _Corrupt("a block is shorter than its restart count")
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise _Corrupt(f"a block claims {restarts} restarts, more than fit")
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or at + rest + length > end:
            raise _Corrupt("an entry reaches beyond its block")
        if shared + rest > MAX_NAME_BYTES:
            raise _Corrupt(f"a name has {shared + rest} bytes, expected at most {MAX_NAME_BYTES}")
        key = key[:shared] + bytes(block[at : at + rest])
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        if at >= len(data):
            raise _Corrupt("a number is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Corrupt("a number has more than 64 bits")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers and values of a protocol buffer message's fields."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Corrupt(f"a message has wire type {wire}")
        if at + size > len(data):
            raise _Corrupt("a message's field is cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _Corrupt("a message has bytes where a number belongs")
    return value


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Corrupt("a message has a number where bytes belong")
    return value


def _parse_header(data: memoryview) -> int:
    shards = 0
    for field, value in _fields(data):
        if field == 1:
            shards = _number(value)
        elif field == 2 and _number(value) != 0:
            raise _Corrupt("the tensors are big-endian")
    if not 1 <= shards <= MAX_SHARDS:
        raise _Corrupt(f"it names {shards} data files")
    return shards


def _parse_entry(data: memoryview) -> Entry:
    code = shard = offset = size = crc = 0
    shape: tuple[int, ...] = ()
    for field, value in _fields(data):
        if field == 1:
            code = _number(value)
        elif field == 2:
            shape = _parse_shape(_message(value))
        elif field == 3:
            shard = _number(value)
        elif field == 4:
            offset = _number(value)
        elif field == 5:
            size = _number(value)
        elif field == 6:
            raw = _message(value)
            if len(raw) != 4:
                raise _Corrupt("a tensor's checksum is not 4 bytes")
            (crc,) = struct.unpack("<I", raw)
        elif field == 7:
            raise _Corrupt("a tensor is stored in slices, which GPT-J checkpoints are not")
    if code not in DTYPES:
        raise _Corrupt(f"a tensor has dtype {code}, expected one of {sorted(DTYPES)}")
    info = TensorInfo(DTYPES[code], shape)
    # Also of an empty tensor: numpy has no array of such a shape.
    if math.prod(max(n, 1) for n in shape) * NUMPY[info.dtype].itemsize >= 2**63:
        raise _Corrupt(f"a tensor's shape {list(shape)} overflows")
    if info.nbytes != size:
        raise _Corrupt(f"a tensor of {info.dtype} {list(shape)} claims {size} bytes")
    if offset >= 2**63:
        raise _Corrupt(f"a tensor begins at byte {offset}")
    return Entry(info, shard, offset, crc)


def _parse_shape(data: memoryview) -> tuple[int, ...]:
    shape: list[int] = []
    for field, value in _fields(data):
        if field != 2:
            continue
        size = 0
        for inner, number in _fields(_message(value)):
            if inner == 1:
                size = _number(number)
        if size >= 2**63:
            raise _Corrupt("a tensor has a negative size")
        if len(shape) == MAX_DIMENSIONS:
            raise _Corrupt(f"a tensor has more than {MAX_DIMENSIONS} dimensions")
        shape.append(size)
    return tuple(shape)


def _index_bytes(entries: Mapping[str, Entry]) -> bytes:
    header = _pack(1, 1) + _pack(3, _pack(1, 1))
    pairs = [(b"", header)]
    pairs += [(name.encode(), _entry_bytes(entry)) for name, entry in entries.items()]
    table = bytearray()
    index: list[tuple[bytes, bytes]] = []
    pending: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in pairs:
        pending.append((key, value))
        size += len(key) + len(value)
        if size >= _BLOCK_SIZE:
            index.append((key, _append_block(table, pending)))
            pending, size = [], 0
    if pending:
        index.append((pending[-1][0], _append_block(table, pending)))
    meta_handle = _append_block(table, [])
    index_handle = _append_block(table, index, restart_interval=1)
    footer = (meta_handle + index_handle).ljust(_FOOTER - 8, b"\0")
    return bytes(table) + footer + struct.pack("<Q", _MAGIC)


def _append_block(
    table: bytearray,
    pairs: list[tuple[bytes, bytes]],
    restart_interval: int = _RESTART_INTERVAL,
) -> bytes:
    """Append a block and its trailer; returns its handle."""
    block = bytearray()
    restarts = [0]
    last = b""
    for n, (key, value) in enumerate(pairs):
        shared = 0
        if n % restart_interval:
            shared = _shared_prefix(last, key)
        elif n:
            restarts.append(len(block))
        for size in (shared, len(key) - shared, len(value)):
            block += encode_varint(size)
        block += key[shared:] + value
        last = key
    block += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    handle = encode_varint(len(table)) + encode_varint(len(block))
    block += b"\0"
    table += block + struct.pack("<I", masked(crc32c(bytes(block))))
    return handle


def _shared_prefix(a: bytes, b: bytes) -> int:
    """Number of bytes that both begin with."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _entry_bytes(entry: Entry) -> bytes:
    dims = b"".join(_pack(2, _pack(1, size)) for size in entry.info.shape)
    return (
        _pack(1, _CODES[entry.info.dtype])
        + _pack(2, dims)
        + (_pack(4, entry.offset) if entry.offset else b"")
        + _pack(5, entry.info.nbytes)
        + encode_varint(6 << 3 | 5)
        + struct.pack("<I", entry.crc)
    )


def _pack(field: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return encode_varint(field << 3) + encode_varint(value)
    return encode_varint(field << 3 | 2) + encode_varint(len(value)) + value
