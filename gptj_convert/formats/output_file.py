"""A file of known size, written at offsets from many threads."""

from __future__ import annotations

import os
from pathlib import Path


class OutputFile:
    """A new file whose space is reserved at once, so that a full disk shows at the first byte.

    Raises:
        OSError: the file exists, or there is no space for it.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            if size:
                os.posix_fallocate(self._fd, 0, size)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` at `offset`."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)

    def sync(self) -> None:
        """Return once the content is on the device."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
