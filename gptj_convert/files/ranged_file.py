"""Files read by ranges from many threads, with errors that say what is wrong with them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptj_model.errors import FileFault

DOWNLOAD_HINT = "fetch the file again, for example with `gptj download`"

#: Alignment of offsets, sizes and addresses that direct I/O needs, in bytes.
ALIGNMENT = 4096
#: Smallest range that is read past the page cache, and the number of bytes per such read.
_DIRECT_FROM = 2**20
_DIRECT_BYTES = 8 * 2**20
#: Number of pages sampled to tell whether a file is in the page cache.
_SAMPLES = 256
_of_thread = threading.local()

_LFS_POINTER = b"version https://git-lfs"


class RangedFile:
    """Open file that threads may share: every read carries its own offset.

    Args:
        path: path of the file.
        expected: what the file should hold, in words for errors.

    Raises:
        FileFault: the file cannot be opened, is empty, or holds a Git LFS pointer or an HTML
            page.
    """

    def __init__(self, path: Path, expected: str = "weights") -> None:
        self.path = path
        self._direct = -1
        try:
            # Non-blocking: opening a named pipe would wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self.size = os.fstat(self._fd).st_size
        except OSError as e:
            raise FileFault(f"{path}: cannot be opened: {e.strerror}") from None
        if self.size >= _DIRECT_FROM and not _is_cached(self._fd, self.size):
            with suppress(OSError):  # tmpfs, for one
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            self._refuse_impostors(expected)
        except BaseException:
            self.close()
            raise

    def _refuse_impostors(self, expected: str) -> None:
        head = self.read(0, min(self.size, 64), "its first bytes").lstrip()
        if not self.size:
            raise FileFault(f"{self.path}: is empty, expected {expected}", hint=DOWNLOAD_HINT)
        if head.startswith(_LFS_POINTER):
            raise FileFault(
                f"{self.path}: holds a Git LFS pointer, expected {expected}",
                hint="run `git lfs pull` in that repository, or `gptj download`",
            )
        if head[:15].lower().startswith((b"<!doctype html", b"<html")):
            raise FileFault(
                f"{self.path}: holds an HTML page, expected {expected}", hint=DOWNLOAD_HINT
            )

    def read_into(self, offset: int, buffer: memoryview, what: str) -> None:
        """Fill a buffer with the bytes of the file from `offset` on.

        Args:
            offset: position in the file, in bytes.
            buffer: memory to fill.
            what: name of the content, for errors.

        Raises:
            FileFault: the file ends too early, or the device fails.
        """
        done = 0
        # Long ranges of a file that is not in the page cache bypass it, including a tail that is
        # not aligned: filling the cache costs more processor time than the conversion.
        directly = self._direct >= 0 and len(buffer) >= _DIRECT_FROM
        read = self._read_directly if directly else self._read_cached
        while done < len(buffer):
            try:
                got = read(offset + done, buffer[done:])
            except OSError as e:
                raise FileFault(
                    f"{self.path}: cannot be read at byte {offset + done} ({what}): {e.strerror}"
                ) from None
            if got == 0:
                raise FileFault(
                    f"{self.path}: ends at byte {offset + done} inside {what}, "
                    f"expected {len(buffer) - done} more bytes",
                    hint=DOWNLOAD_HINT,
                )
            done += got

    def _read_cached(self, offset: int, buffer: memoryview) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def _read_directly(self, offset: int, buffer: memoryview) -> int:
        """Read with one system call; return the number of bytes, 0 only at the end of the file."""
        skip = offset % ALIGNMENT
        whole = len(buffer) // ALIGNMENT * ALIGNMENT
        aligned = whole and not skip and _address(buffer) % ALIGNMENT == 0
        if aligned:
            memory = buffer[:whole]
        else:
            memory = bounce_memory()[: -(-(skip + len(buffer)) // ALIGNMENT) * ALIGNMENT]
        try:
            got = os.preadv(self._direct, [memory], offset - skip) - skip
        except OSError as e:
            if e.errno != errno.EINVAL:  # the device wants a stricter alignment
                raise
            return self._read_cached(offset, buffer)
        got = max(0, min(got, len(buffer)))
        if not aligned:
            buffer[:got] = memory[skip : skip + got]
        return got

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Return bytes of the file.

        Args:
            offset: position in the file, in bytes.
            length: number of bytes, which the caller has checked against `size`.
            what: name of the content, for errors.

        Raises:
            FileFault: the file ends too early, or the device fails.
        """
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer), what)
        return bytes(buffer)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


def _is_cached(fd: int, size: int) -> bool:
    """Return whether most of a file is in the page cache, judged by a sample of its pages."""
    try:
        mincore = ctypes.CDLL(None).mincore
        resident = sum(_is_resident(mincore, fd, size * n // _SAMPLES) for n in range(_SAMPLES))
    except (OSError, ValueError, AttributeError):
        return True
    return resident > _SAMPLES // 2


def _is_resident(mincore: Any, fd: int, offset: int) -> bool:
    # ctypes can only point into a writable mapping; a private one is never written back.
    begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(fd, 1, access=mmap.ACCESS_COPY, offset=begin) as page:
        inside, answer = ctypes.c_char.from_buffer(page), ctypes.c_ubyte()
        failed = mincore(ctypes.byref(inside), ctypes.c_size_t(1), ctypes.byref(answer))
        del inside  # a pointer into it would keep the mapping from closing
    return bool(failed) or bool(answer.value & 1)


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def bounce_memory() -> memoryview:
    """Return this thread's aligned buffer for direct reads and writes."""
    if not hasattr(_of_thread, "bounce"):
        _of_thread.bounce = memoryview(mmap.mmap(-1, _DIRECT_BYTES + ALIGNMENT))
    return _of_thread.bounce
