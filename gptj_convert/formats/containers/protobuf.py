"""The wire format of protocol buffers: numbers, fields and messages, read and written.

A message is a run of fields. A field is a tag (its number and wire type) and its content: a
varint, 4 or 8 bytes, or a length and that many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

#: Wire types of fields.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
#: Size of the longest varint, in bytes: 64 bits, seven in each byte.
MAX_VARINT_BYTES = 10


class WireError(ValueError):
    """Bytes that break a rule of the wire format; the text says which one."""


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read a number of seven bits per byte, the lowest first.

    Args:
        data: bytes to read from.
        at: position of the number's first byte.

    Returns:
        The number, from 0 to 2**70, and the position after its last byte.

    Raises:
        WireError: the data ends inside the number, or it has more than 10 bytes.
    """
    if at < len(data) and data[at] < 0x80:  # most numbers: a shorter way
        return data[at], at + 1
    value = 0
    for shift in range(0, 7 * MAX_VARINT_BYTES, 7):
        if at >= len(data):
            raise WireError("a number is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise WireError("a number has more than 64 bits")


def encode_varint(number: int) -> bytes:
    """Return the bytes of a number from 0 on, seven bits in each, the lowest first."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield the number, wire type and content of each field of a message.

    The content of a varint is its encoded bytes, and that of a length-delimited field begins
    after its length.

    Raises:
        WireError: a field is cut short, is a group, or has the number 0.
    """
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        begin, wire_type = at, tag & 7
        if wire_type == BYTES:
            size, begin = read_varint(data, at)
            at = begin + size
        elif wire_type == VARINT:
            _, at = read_varint(data, at)
        elif wire_type in (FIXED64, FIXED32):
            at += 8 if wire_type == FIXED64 else 4
        else:
            raise WireError(f"a message has wire type {wire_type}")
        if at > len(data):
            raise WireError("a message's field is cut short")
        if tag < 8:
            raise WireError("a message has a field of number 0")
        yield tag >> 3, wire_type, data[begin:at]


def as_number(wire_type: int, content: memoryview) -> int:
    """Return the value of a field that must be a varint.

    Raises:
        WireError: it has another wire type.
    """
    if wire_type != VARINT:
        raise WireError("a message has bytes where a number belongs")
    return read_varint(content, 0)[0]


def as_message(wire_type: int, content: memoryview) -> memoryview:
    """Return the bytes of a field that must be length-delimited.

    Raises:
        WireError: it has another wire type.
    """
    if wire_type != BYTES:
        raise WireError("a message has a number where bytes belong")
    return content


def as_fixed32(wire_type: int, content: memoryview) -> int:
    """Return the value of a field that must be an unsigned number of 4 bytes.

    Raises:
        WireError: it has another wire type.
    """
    if wire_type != FIXED32:
        raise WireError(f"a message has wire type {wire_type} where a number of 4 bytes belongs")
    return struct.unpack("<I", content)[0]


def encode_field(number: int, value: int | bytes) -> bytes:
    """Return a field with its tag: a number as a varint, bytes with their length."""
    if isinstance(value, int):
        return encode_varint(number << 3 | VARINT) + encode_varint(value)
    return encode_varint(number << 3 | BYTES) + encode_varint(len(value)) + value


def encode_fixed32(number: int, value: int) -> bytes:
    """Return a field with its tag whose value is an unsigned number of 4 bytes."""
    return encode_varint(number << 3 | FIXED32) + struct.pack("<I", value)
