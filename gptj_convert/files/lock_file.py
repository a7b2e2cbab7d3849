"""Lock files that name the process holding them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TextIO


def try_lock(lock: TextIO) -> str | None:
    """Lock a file until it is closed or the process ends.

    Args:
        lock: file that is open for reading and writing.

    Returns:
        None if the file is now locked; otherwise the id of the process that holds it, or "?" if
        that is unknown.
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


def is_held(path: Path) -> bool:
    """Return whether a process holds a lock file; the file is not changed."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
