"""Memory in whole pages, for large arrays that are used again and again."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

from gptj_model.errors import MemoryFault


def page_memory(count: int, size: int) -> list[np.ndarray]:
    """Arrays of bytes that begin with a page; the system gives each page when it is first used.

    Args:
        count: of arrays.
        size: of each, in bytes.

    Raises:
        MemoryFault: the system does not give it.
    """
    found = []
    try:
        for _ in range(count):
            memory = mmap.mmap(-1, max(size, 1))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)  # a matrix's columns lie far apart
            found.append(np.frombuffer(memory, np.uint8))
    except OSError:
        raise MemoryFault(
            f"{count * size / 1e9:.2f} GB of memory are needed for {count} pieces of the "
            "largest tensor, and the system gives less",
            hint="end other programs, or raise the limit on this one (`ulimit -v`, cgroup)",
        ) from None
    return found


def whole_pages(size: int) -> int:
    """The least number of bytes that is not smaller and ends with a page."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
