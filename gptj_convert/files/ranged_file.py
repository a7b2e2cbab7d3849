"""A file read by ranges from many threads, with faults that say what is wrong with it."""

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

#: Offsets, sizes and addresses of this alignment may go to and from a device directly.
ALIGNMENT = 4096
#: Ranges from this size on are read directly, and how much of one at once, wherever it begins.
_DIRECT_FROM = 2**20
_DIRECT_BYTES = 8 * 2**20
#: Pages that tell whether a file is in the page cache.
_SAMPLES = 256
_of_thread = threading.local()

_LFS_POINTER = b"version https://git-lfs"


class RangedFile:
    """An open file. Reads carry their own offset, so threads may share it.

    Args:
        path: of the file.
        expected: what it should hold, for errors.

    Raises:
        FileFault: it cannot be opened, or is plainly something else (empty, a Git LFS pointer,
            an HTML page).
    """

    def __init__(self, path: Path, expected: str = "weights") -> None:
        self.path = path
        self._direct = -1
        try:
            # Not blocking: a named pipe would wait for a writer.
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
        """Fill `buffer` from `offset`; `what` names the content in errors.

        Raises:
            FileFault: the file ends before, or the device fails.
        """
        done = 0
        # Long ranges of a file that is not in the page cache go around it, to their last byte:
        # filling it costs more processor time than converting what is read.
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
                    f"expected {len(buffer) - done} bytes more",
                    hint=DOWNLOAD_HINT,
                )
            done += got

    def _read_cached(self, offset: int, buffer: memoryview) -> int:
        return os.preadv(self._fd, [buffer], offset)

    def _read_directly(self, offset: int, buffer: memoryview) -> int:
        """What one call of the system gives. Returns 0 at the end of the file only."""
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
            if e.errno != errno.EINVAL:  # a device that wants a stricter alignment
                raise
            return self._read_cached(offset, buffer)
        got = max(0, min(got, len(buffer)))
        if not aligned:
            buffer[:got] = memory[skip : skip + got]
        return got

    def read(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes from `offset`. The caller has compared `length` with `size`."""
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
    """Whether most of a file is in the page cache, by a few of its pages; reads nothing."""
    try:
        mincore = ctypes.CDLL(None).mincore
        resident = sum(_is_resident(mincore, fd, size * n // _SAMPLES) for n in range(_SAMPLES))
    except (OSError, ValueError, AttributeError):
        return True
    return resident > _SAMPLES // 2


def _is_resident(mincore: Any, fd: int, offset: int) -> bool:
    # A private mapping, which ctypes can point into; nothing is written to it.
    begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(fd, 1, access=mmap.ACCESS_COPY, offset=begin) as page:
        inside, answer = ctypes.c_char.from_buffer(page), ctypes.c_ubyte()
        failed = mincore(ctypes.byref(inside), ctypes.c_size_t(1), ctypes.byref(answer))
        del inside  # else the mapping cannot be closed
    return bool(failed) or bool(answer.value & 1)


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def bounce_memory() -> memoryview:
    """Aligned memory of this thread, for what goes to or from a device directly."""
    if not hasattr(_of_thread, "bounce"):
        _of_thread.bounce = memoryview(mmap.mmap(-1, _DIRECT_BYTES + ALIGNMENT))
    return _of_thread.bounce
