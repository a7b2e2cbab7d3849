"""Memory in whole pages, for large arrays that are used again and again."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from gptj_model.dtypes import NUMPY
from gptj_model.errors import MemoryFault
from gptj_model.source import TensorInfo

#: Shared memory, which is the default, has large pages on few systems.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


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
            memory = mmap.mmap(-1, max(size, 1), **_PRIVATE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    memory.madvise(mmap.MADV_HUGEPAGE)  # a matrix's columns lie far apart
            found.append(np.frombuffer(memory, np.uint8))
    except OSError:
        raise MemoryFault(
            f"{count * size / 1e9:.2f} GB of memory are needed at once, and the system gives less",
            hint="end other programs, or raise the limit on this one (`ulimit -v`, cgroup)",
        ) from None
    return found


def whole_pages(size: int) -> int:
    """The least number of bytes that is not smaller and ends with a page."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def page_arrays(memory: np.ndarray, infos: Sequence[TensorInfo]) -> list[np.ndarray]:
    """Arrays for such tensors in memory that begins with a page, as does each of them.

    Args:
        memory: of `page_memory`, at least `whole_pages` of each tensor's bytes.
        infos: of the tensors.
    """
    found, begin = [], 0
    for info in infos:
        part = memory[begin : begin + info.nbytes]
        found.append(part.view(NUMPY[info.dtype]).reshape(info.shape))
        begin += whole_pages(info.nbytes)
    return found
