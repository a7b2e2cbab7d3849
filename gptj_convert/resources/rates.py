"""Rates of this machine at the work that conversions and models consist of, measured in about a
second."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptj_convert.files.output_file import OutputFile
from gptj_convert.files.ranged_file import RangedFile
from gptj_convert.streams.pipeline import BufferPool, Pipeline
from gptj_convert.streams.strips import PANEL_BYTES, Strip
from gptj_convert.streams.writer import BLOCK_BYTES
from gptj_model.op import Op

#: Seconds per measurement, and the most bytes that are written.
_SECONDS = 0.3
_WRITTEN = 256 * 10**6
#: Number of blocks written between two calls that wait for the device.
_SYNC = 4

_MATRIX = 4096
_FACTOR = 1024


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates in bytes per second, except `multiplication`."""

    sha256: float
    transposition: float
    """Transposition of a float32 matrix by one thread."""
    write: float
    """Writing to the folder's disk, around the page cache where possible."""
    read: float
    """Reading from the folder's disk, around the page cache where possible."""
    multiplication: float
    """Multiplication of float32 matrices on all cores, in floating-point operations per second."""


def measure(folder: Path) -> Rates:
    """Return the measured rates; the file written in `folder` is already unnamed.

    Raises:
        FileFault, OSError: the folder is not writable.
    """
    block = np.ones(BLOCK_BYTES, np.uint8)
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    strip, out = Strip(matrix, Op.TRANSPOSE), np.empty(PANEL_BYTES // 4, np.float32)
    places = itertools.cycle(range(0, matrix.size, out.size))
    factor = matrix[:_FACTOR, :_FACTOR].copy()
    write, read = _disk_rates(folder)
    return Rates(
        sha256=_rate(block.nbytes, lambda: hashlib.sha256(block.data)),
        transposition=_rate(out.nbytes, lambda: strip.fill(out, next(places))),
        write=write,
        read=read,
        multiplication=_rate(2 * _FACTOR**3, lambda: factor @ factor),
    )


def _rate(amount: int, act: Callable[[], object]) -> float:
    act()  # allocates memory and threads
    begun, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < _SECONDS:
        act()
        count += 1
    return amount * count / passed


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Return the rates of writing, and of reading what was written."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".gptj-doctor-") as place, Pipeline() as p:
        (memory := BufferPool(p, 1, BLOCK_BYTES).take()).fill(1)
        blocks = _WRITTEN // BLOCK_BYTES
        output = OutputFile(Path(place) / "written", blocks * BLOCK_BYTES)
        source = RangedFile(output.path)
        output.path.unlink()
        n = 0
        try:
            begun = time.perf_counter()
            for n in range(1, blocks + 1):
                output.write((n - 1) * BLOCK_BYTES, memory.data)
                if n % _SYNC == 0 or n == blocks:
                    output.sync()
                    if time.perf_counter() - begun > _SECONDS:
                        break
            written = n * BLOCK_BYTES / (time.perf_counter() - begun)
            starts = itertools.cycle(range(0, n * BLOCK_BYTES, BLOCK_BYTES))
            read = _rate(
                BLOCK_BYTES, lambda: source.read_into(next(starts), memory.data, "what was written")
            )
            return written, read
        finally:
            output.close()
            source.close()
