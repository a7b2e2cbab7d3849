"""A file that one process holds at a time, and that says which."""

from __future__ import annotations

import fcntl
import os
from typing import TextIO


def hold(lock: TextIO) -> str | None:
    """Hold a file, open for reading and writing, until it is closed or the process ends.

    Returns:
        None; where another process holds it, that process's number, or "?".
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return lock.read().strip() or "?"
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return None
