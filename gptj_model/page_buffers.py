"""Page-aligned memory for large arrays that are reused."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from gptj_model.dtypes import NUMPY
from gptj_model.errors import MemoryFault
from gptj_model.source import TensorInfo

#: Private mappings, because shared ones, the default, get huge pages on few systems.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def page_buffers(count: int, size: int) -> list[np.ndarray]:
    """Return page-aligned byte arrays; the system provides each page when it is first used.

    Args:
        count: number of arrays.
        size: size of each array in bytes.

    Raises:
        MemoryFault: the system does not provide the memory.
    """
    found = []
    try:
        for _ in range(count):
            memory = mmap.mmap(-1, max(size, 1), **_PRIVATE)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # this kernel has none
                    memory.madvise(mmap.MADV_HUGEPAGE)  # the elements of a column lie far apart
            found.append(np.frombuffer(memory, np.uint8))
    except OSError:
        raise MemoryFault(
            f"{count * size / 1e9:.2f} GB of memory needed at once, but the system provides less",
            hint="close other programs, or raise the limit of this one (`ulimit -v`, cgroup)",
        ) from None
    return found


def whole_pages(size: int) -> int:
    """Return the number of bytes rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def page_arrays(memory: np.ndarray, infos: Sequence[TensorInfo]) -> list[np.ndarray]:
    """Return arrays for these tensors, each page-aligned, in memory that is page-aligned.

    Args:
        memory: array from `page_buffers` that holds at least `whole_pages` of each tensor's bytes.
        infos: dtype and shape of each tensor.
    """
    found, begin = [], 0
    for info in infos:
        part = memory[begin : begin + info.nbytes]
        found.append(part.view(NUMPY[info.dtype]).reshape(info.shape))
        begin += whole_pages(info.nbytes)
    return found
