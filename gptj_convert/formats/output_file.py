"""A file of known size, written at offsets from many threads."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptj_model.errors import FileFault

#: Errors that mean: no more space, on the disk, in the quota, or under a limit.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputFile:
    """A new file whose space is reserved at once, so that a full disk shows at the first byte.

    Raises:
        FileFault: it exists already, there is no space for it, or writing fails.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._fd = -1
        with self._faults():
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            if size:
                os.posix_fallocate(self._fd, 0, size)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""
        done = 0
        with self._faults():
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], offset + done)

    def sync(self) -> None:
        """Return once the content is on the device."""
        with self._faults():
            os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            self.close()
            raise FileFault(
                f"{self.path}: cannot be written: {e.strerror}",
                hint="free some space and run it again" if e.errno in FULL else None,
            ) from None
