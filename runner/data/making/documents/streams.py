"""Files of text, decompressed as they are read.

The content of a file says how it is compressed. Where its name says otherwise, `misnamed` has a
note for people.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from runner.data.making.long_line import Damaged

#: Kind of compression by the suffix of a name.
COMPRESSED = {
    ".gz": "gzip",
    ".zst": "zstandard",
    ".zstd": "zstandard",
    ".xz": "xz",
    ".bz2": "bzip2",
}

_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstandard": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
#: Largest window of a zstandard frame in bytes, as a power of 2.
_ZSTD_WINDOW_LOG = 27
#: Largest memory in bytes that an xz stream may require.
_XZ_MEMORY = 2**28
#: Size in bytes of what is read of a compressed file at once.
_BLOCK = 2**16

#: Encodings by their byte-order mark, the longer marks first.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
#: Encodings without a mark, by the zeros in the first four bytes of text that begins in ASCII.
_ZEROS = (
    (re.compile(rb"[^\0]\0\0\0", re.DOTALL), "UTF-32LE"),
    (re.compile(rb"\0\0\0[^\0]", re.DOTALL), "UTF-32BE"),
    (re.compile(rb"[^\0]\0[^\0]\0", re.DOTALL), "UTF-16LE"),
    (re.compile(rb"\0[^\0]\0[^\0]", re.DOTALL), "UTF-16BE"),
)


class Stream:
    """A file, decompressed as it is read, with the position in the compressed file.

    Attributes:
        file: decompressed content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        kind = compression(path)
        self._raw = path.open("rb")
        if kind == "gzip":
            self.file = cast(BinaryIO, gzip.GzipFile(fileobj=self._raw, mode="rb"))
        elif kind == "zstandard":
            from backports.zstd import DecompressionParameter, ZstdFile

            options = {int(DecompressionParameter.window_log_max): _ZSTD_WINDOW_LOG}
            self.file = cast(BinaryIO, ZstdFile(self._raw, options=options))
        elif kind == "xz":
            new = lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY)  # noqa: E731
            self.file = cast(BinaryIO, io.BufferedReader(_Streams(self._raw, new)))
        elif kind == "bzip2":
            new = bz2.BZ2Decompressor
            self.file = cast(BinaryIO, io.BufferedReader(_Streams(self._raw, new)))
        else:
            self.file = self._raw

    def begin(self) -> bytes:
        """Remove a UTF-8 byte-order mark, and return the beginning of the content.

        Raises:
            Damaged: the content is UTF-16 or UTF-32.
        """
        file: Any = self.file
        head: bytes = file.peek(4)
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
            return file.peek(4)
        encoding = next((name for mark, name in _MARKS if head.startswith(mark)), None)
        encoding = encoding or next((name for z, name in _ZEROS if z.match(head)), None)
        if encoding:
            packed = f"{self.path} unpacked" if self.file is not self._raw else str(self.path)
            raise Damaged(
                f"the text is {encoding}, expected UTF-8",
                hint=f"convert {packed}, as with `iconv -f {encoding} -t UTF-8 < OLD > NEW`",
            )
        return head

    def tell(self) -> int:
        """Return the number of bytes of the compressed file that have been read."""
        return self._raw.tell()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        self._raw.close()


class _Streams(io.RawIOBase):
    """Streams of xz or bzip2 after one another, decompressed as they are read."""

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw = raw
        self._new = new
        self._decompressor = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._decompressor.eof:
                rest = self._decompressor.unused_data.lstrip(b"\0")  # zeros may pad a stream
                while not rest and (block := self._raw.read(_BLOCK)):
                    rest = block.lstrip(b"\0")
                if not rest:
                    return 0
                self._decompressor, data = self._new(), rest
            elif self._decompressor.needs_input and not (data := self._raw.read(_BLOCK)):
                raise EOFError
            try:
                out = self._decompressor.decompress(data, len(buffer))
            except (lzma.LZMAError, OSError) as e:
                raise zlib.error(str(e)) from None
            if out:
                buffer[: len(out)] = out
                return len(out)


def compression(path: Path) -> str:
    """Return how a file is compressed: a value of `COMPRESSED`, or "".

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(2**12)
    found = next((kind for kind, magic in _MAGIC.items() if magic.match(head)), "")
    named = COMPRESSED.get(path.suffix.lower(), "")
    # What is neither compressed nor text is a damaged file of the kind that its name says.
    return found or ("" if head and _is_text(head) else named)


def misnamed(path: Path) -> str | None:
    """Return in words that a file is compressed in another way than its name says, or None.

    Raises:
        OSError: the file cannot be read.
    """
    found, named = compression(path), COMPRESSED.get(path.suffix.lower(), "")
    if found == named:
        return None
    what = f"is compressed with {found}" if found else "is not compressed"
    expected = f"its name says {named}" if named else "its name does not say so"
    return f"{path}: {what}, {expected}; it is read by its content"


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def damages() -> tuple[type[Exception], ...]:
    """Return what decompressors raise at damaged data; other exceptions come from the disk."""
    from backports.zstd import ZstdError

    return (EOFError, zlib.error, gzip.BadGzipFile, ZstdError)


def in_words(error: Exception) -> str:
    """Describe an exception of `damages`."""
    if isinstance(error, EOFError):
        return "the compressed file is cut: it ends inside a frame"
    return f"the compressed file is damaged here: {error}"
