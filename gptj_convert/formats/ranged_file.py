"""A file read by ranges from many threads, with faults that say what is wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

from gptj_model.errors import FileFault

DOWNLOAD_HINT = "fetch the file again, for example with `gptj download`"
_LFS_POINTER = b"version https://git-lfs"


class RangedFile:
    """An open file. Reads carry their own offset, so threads may share it.

    Raises:
        FileFault: it cannot be opened, or is plainly not a checkpoint (empty, a Git LFS
            pointer, an HTML page).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Not blocking: a named pipe would wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self.size = os.fstat(self._fd).st_size
        except OSError as e:
            raise FileFault(f"{path}: cannot be opened: {e.strerror}") from None
        try:
            self._refuse_impostors()
        except BaseException:
            self.close()
            raise

    def _refuse_impostors(self) -> None:
        head = self.read(0, min(self.size, 64), "its first bytes").lstrip()
        if not self.size:
            raise FileFault(f"{self.path}: is empty, expected weights", hint=DOWNLOAD_HINT)
        if head.startswith(_LFS_POINTER):
            raise FileFault(
                f"{self.path}: holds a Git LFS pointer, expected weights",
                hint="run `git lfs pull` in that repository, or `gptj download`",
            )
        if head[:15].lower().startswith((b"<!doctype html", b"<html")):
            raise FileFault(
                f"{self.path}: holds an HTML page, expected weights", hint=DOWNLOAD_HINT
            )

    def read_into(self, offset: int, buffer: memoryview, what: str) -> None:
        """Fill `buffer` from `offset`; `what` names the content in errors.

        Raises:
            FileFault: the file ends before, or the device fails.
        """
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._fd, [buffer[done:]], offset + done)
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

    def read(self, offset: int, length: int, what: str) -> bytes:
        """`length` bytes from `offset`. The caller has compared `length` with `size`."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer), what)
        return bytes(buffer)

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
