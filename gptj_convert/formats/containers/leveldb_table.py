"""The LevelDB table: sorted pairs of key and value in blocks, read and written in memory.

A block holds pairs whose keys are shortened by what they share with the key before, and
restarts: positions of whole keys. Behind each block are its kind of compression and a masked
crc32c. The index block names the place of every other block, and the footer that of the index.
Format: leveldb's doc/table_format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from crc32c import crc32c

from gptj_convert.formats.containers.protobuf import encode_varint, read_varint

FOOTER_BYTES = 48
#: Limit on the length of a key: a few bytes can describe many long ones.
MAX_KEY_BYTES = 1024
_MAGIC = 0xDB4775248B80FB57
#: A block ends once its keys and values have this many bytes.
_BLOCK_BYTES = 4096
#: Number of pairs from one whole key to the next.
_RESTART_INTERVAL = 16


class TableError(ValueError):
    """Bytes that break a rule of the table format; the text says which one."""


def masked(crc: int) -> int:
    """Return LevelDB's mask of a crc32c: the crc of data that holds a crc would be weak."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def unmasked(value: int) -> int:
    """Return the crc32c that `masked` turned into this value."""
    rotated = (value - 0xA282EAD8) & 0xFFFFFFFF
    return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF


def read_table(table: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the pairs of a table of at least `FOOTER_BYTES`, in the order of their keys.

    Raises:
        TableError: a block is damaged, compressed or misplaced, or the keys are not in order.
        WireError: a number is cut short or too long.
    """
    footer = table[-FOOTER_BYTES:]
    if struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise TableError("its last 8 bytes are not the table's magic number")
    _, at = read_varint(footer, 0)
    _, at = read_varint(footer, at)
    index_handle = _read_handle(footer[at:])
    end, last = 0, None
    for _, handle in _block_pairs(_read_block(table, *index_handle)):
        # Every writer puts the blocks in order. In any order, a small file could name one block
        # again and again.
        offset, size = _read_handle(handle)
        if offset < end:
            raise TableError(f"the block at byte {offset} begins inside the one before it")
        end = offset + size
        for key, value in _block_pairs(_read_block(table, offset, size)):
            if last is not None and key <= last:
                raise TableError("its names are not in order, or one occurs twice")
            yield key, value
            last = key


def table_bytes(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the table that holds these pairs, which are sorted by key."""
    table = bytearray()
    index: list[tuple[bytes, bytes]] = []
    pending: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in pairs:
        pending.append((key, value))
        size += len(key) + len(value)
        if size >= _BLOCK_BYTES:
            index.append((key, _append_block(table, pending)))
            pending, size = [], 0
    if pending:
        index.append((pending[-1][0], _append_block(table, pending)))
    meta_handle = _append_block(table, [])
    index_handle = _append_block(table, index, restart_interval=1)
    footer = (meta_handle + index_handle).ljust(FOOTER_BYTES - 8, b"\0")
    return bytes(table) + footer + struct.pack("<Q", _MAGIC)


def _read_handle(data: memoryview) -> tuple[int, int]:
    """Read the offset and the size of a block."""
    offset, at = read_varint(data, 0)
    size, _ = read_varint(data, at)
    return offset, size


def _read_block(table: memoryview, offset: int, size: int) -> memoryview:
    """Return a block without its trailer, which must have the right checksum."""
    end = offset + size
    if end + 5 > len(table):
        raise TableError(f"a block at byte {offset} reaches beyond the end")
    if table[end] != 0:
        raise TableError(f"the block at byte {offset} is compressed, which checkpoints are not")
    (stored,) = struct.unpack("<I", table[end + 1 : end + 5])
    if stored != masked(crc32c(table[offset : end + 1])):
        raise TableError(f"checksum of the block at byte {offset} is wrong")
    return table[offset:end]


def _block_pairs(block: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    if len(block) < 4:
        raise TableError("a block is shorter than its restart count")
    (restarts,) = struct.unpack("<I", block[-4:])
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise TableError(f"a block claims {restarts} restarts, more than fit")
    at, key = 0, b""
    while at < end:
        shared, at = read_varint(block, at)
        rest, at = read_varint(block, at)
        length, at = read_varint(block, at)
        if shared > len(key) or at + rest + length > end:
            raise TableError("an entry reaches beyond its block")
        if shared + rest > MAX_KEY_BYTES:
            raise TableError(f"a name has {shared + rest} bytes, expected at most {MAX_KEY_BYTES}")
        key = key[:shared] + bytes(block[at : at + rest])
        yield key, block[at + rest : at + rest + length]
        at += rest + length


def _append_block(
    table: bytearray,
    pairs: list[tuple[bytes, bytes]],
    restart_interval: int = _RESTART_INTERVAL,
) -> bytes:
    """Append a block with its trailer to the table, and return its handle."""
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
    """Return the number of bytes that both begin with."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
