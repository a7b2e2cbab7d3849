"""Output files of known size, written at offsets."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptj_convert.files.ranged_file import ALIGNMENT, bounce_memory
from gptj_model.errors import FileFault

#: Errors for a lack of space: a full disk, an exhausted quota, a limit on file sizes.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputFile:
    """Output file whose space is reserved when it is opened, so that a full disk shows at once.

    Aligned data bypasses the page cache where the file system allows it: the copy into the cache
    would cost more processor time than the conversion itself.

    Args:
        path: path of the file, which must not exist unless `existing` is set.
        size: final size of the file, in bytes.
        existing: reuse the file of an interrupted run.

    Raises:
        FileFault: the file already exists, the disk is full, or writing fails.
    """

    def __init__(self, path: Path, size: int, *, existing: bool = False) -> None:
        self.path = path
        self._fd = self._direct = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with self._faults():
            self._fd = os.open(path, flags | (0 if existing else os.O_EXCL), 0o644)
            if os.fstat(self._fd).st_size > size:
                os.ftruncate(self._fd, size)
            if size:
                os.posix_fallocate(self._fd, 0, size)
        if size >= ALIGNMENT and hasattr(os, "O_DIRECT"):
            with suppress(OSError):  # tmpfs, for one
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""
        with self._faults():
            done = self._write_directly(offset, data)
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], offset + done)

    def _write_directly(self, offset: int, data: memoryview) -> int:
        """Write past the page cache what alignment allows, and return the number of bytes."""
        whole = len(data) // ALIGNMENT * ALIGNMENT
        if self._direct < 0 or offset % ALIGNMENT or not whole:
            return 0
        # Copying to aligned memory costs a tenth of the copy into the page cache.
        bounce = None if _address(data) % ALIGNMENT == 0 else bounce_memory()
        done = 0
        try:
            while done < whole:
                part = data[done:whole]
                if bounce:
                    part = bounce[: min(len(bounce), len(part))]
                    part[:] = data[done : done + len(part)]
                written = os.pwrite(self._direct, part, offset + done)
                done += written
                if written % ALIGNMENT:
                    break
        except OSError as e:
            if e.errno != errno.EINVAL:  # the device wants a stricter alignment
                raise
        return done

    def sync(self) -> None:
        """Flush the file to the device."""
        with self._faults():
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1

    @contextmanager
    def _faults(self) -> Generator[None]:
        try:
            yield
        except OSError as e:
            self.close()
            raise FileFault(
                f"{self.path}: cannot be written: {e.strerror}",
                hint="free some space and run it again" if e.errno in FULL else None,
            ) from None


def _address(data: memoryview) -> int:
    import numpy as np  # here, because the CLI imports this module only for its constants

    return np.frombuffer(data, np.uint8).ctypes.data
