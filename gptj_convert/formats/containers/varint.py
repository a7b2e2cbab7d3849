"""Numbers as protocol buffers and LevelDB write them: seven bits a byte, the lowest first."""

from __future__ import annotations


def encode_varint(number: int) -> bytes:
    """A number from 0 on."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
