"""Control of freed memory in the C library."""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: Parameters of glibc's mallopt: the size from which memory is mapped and unmapped by itself, and
#: the amount that may lie free before it is returned.
_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
#: Bytes that are returned to the system at once.
_WORTH = 64 * 2**20


def keep_freed_memory() -> None:
    """Let large arrays reuse the memory of freed ones, where the C library supports it.

    By default the library returns each array to the system, which clears every page it provides
    again.
    """
    with suppress(OSError, AttributeError):  # another library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory(worth: int) -> None:
    """Return the memory that `keep_freed_memory` has kept so far.

    Args:
        worth: about how many bytes are free; little memory is not worth a walk through all of it.
    """
    if worth < _WORTH:
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
