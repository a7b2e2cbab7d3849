"""What becomes of memory that was freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: Parameters of glibc's mallopt: where a size is taken from the system and given back by itself,
#: and how much may lie free before some is given back.
_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1


def keep_freed_memory() -> None:
    """Give large arrays the memory of those that were freed, where the C library can be told so.

    By itself it gives each one back to the system, which clears every page that it gives anew.
    """
    with suppress(OSError, AttributeError):  # another library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Give back what `keep_freed_memory` has kept so far."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
