"""Writer of the files of a layout, in one pass: laid out, hashed and written in parallel.

After an interrupted pass, `find_resume_point` reads and hashes the tensors that are complete, and
writing resumes behind them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from gptj_convert.files.output_file import OutputFile
from gptj_convert.files.ranged_file import ALIGNMENT
from gptj_convert.formats.containers.layout import FileLayout, Layout
from gptj_convert.streams.pipeline import BufferPool, Pipeline
from gptj_convert.streams.progress import Progress
from gptj_convert.streams.strips import Strip
from gptj_model.dtypes import NUMPY
from gptj_model.op import Op

#: Size of a block, which is laid out, hashed and written as a whole, and the number of buffers.
#: Measured 2026-11 on 2 cores by benchmarks/conversion.py: from row-major float16, blocks of 8 MiB
#: (256 rows of a feed-forward matrix) are laid out at 0.65 GB/s; 1,024 rows would reach 1.1 GB/s,
#: but take 0.1 GB more memory than a conversion may have.
BLOCK_BYTES = 8 * 2**20
BLOCKS = 8
#: Most rows of a transposed matrix that are laid out together.
_ROWS_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class BlockWritten:
    """Event: a block is in its file, except for less than a page, which the next one writes."""

    nbytes: int
    file: str
    tensors: tuple[tuple[str, int], ...]
    """Name and crc32c of each tensor that is now complete."""


@dataclass(slots=True)
class ResumePoint:
    """Position at which writing begins; everything before it has been written."""

    file: int = 0
    """Number of the file in the layout."""
    offset: int = 0
    """Offset in that file, in bytes, at which a part begins."""
    sha256: Any = field(default_factory=hashlib.sha256)
    """State of the hash of that file's bytes up to `offset`."""
    head: bytes = b""
    """Bytes of that file from the last page boundary up to `offset`."""
    done: int = 0
    """Number of bytes before the position, in all files."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 in hex of each file before the position, by name."""
    checksums: dict[str, int] = field(default_factory=dict)
    """crc32c of each tensor before the position, by name."""


def reserve(layout: Layout, folder: Path, *, existing: bool = False) -> None:
    """Create every file at its full size, so that a full disk shows before the first byte.

    Raises:
        FileFault: the disk is full, or a file exists and `existing` is off.
    """
    for file in layout.files:
        OutputFile(folder / file.name, layout.size(file), existing=existing).close()


def write_files(
    layout: Layout,
    folder: Path,
    content: Callable[[str], Iterable[Strip]],
    pipeline: Pipeline,
    start: ResumePoint,
) -> Iterator[BlockWritten]:
    """Write everything from `start` on, in order, and then the index.

    Args:
        layout: layout of the files, which `reserve` has created.
        folder: folder of the files.
        content: function that returns the strips of a tensor; it runs in another thread.
        pipeline: owner of the threads.
        start: position at which writing begins. Its digests and checksums are extended by those of
            everything written.

    Yields:
        An event for each block.

    Raises:
        FileFault: writing fails.
    """
    buffers = BufferPool(pipeline, BLOCKS, BLOCK_BYTES)
    blocks = pipeline.prefetch(_lay_out(layout, content, start, buffers), depth=BLOCKS)
    output: OutputFile | None = None
    waiting: list[tuple[str, int, int]] = []
    try:
        for block in pipeline.prefetch(_hash(blocks, start.sha256), depth=BLOCKS):
            if output is None:
                path = folder / block.file.name
                output = OutputFile(path, layout.size(block.file), existing=True)
            end = block.end if block.is_last else block.end // ALIGNMENT * ALIGNMENT
            output.write(block.offset, block.memory[:end].data)
            waiting += block.finished
            whole = {n: crc for n, crc, last in waiting if last <= block.offset + end}
            waiting = [t for t in waiting if t[0] not in whole]
            start.checksums.update(whole)
            nbytes = block.end - block.skip
            buffers.give(block.memory)
            yield BlockWritten(nbytes, block.file.name, tuple(whole.items()))
            if block.sha256:
                start.digests[block.file.name] = block.sha256
                output.sync()
                output.close()
                output = None
    finally:
        if output:
            output.close()
    for name, small in layout.index(start.checksums).items():
        (folder / name).write_bytes(small)


def find_resume_point(
    layout: Layout, folder: Path, finished: Mapping[str, int]
) -> Generator[Progress, None, ResumePoint]:
    """Find where an interrupted pass can be resumed.

    The position is behind the last of the complete tensors, in order, whose bytes still have the
    recorded checksum.

    Args:
        layout: layout of the interrupted pass.
        folder: folder with the files that it left.
        finished: crc32c of each tensor that it wrote, by name.

    Yields:
        The progress of reading.

    Returns:
        The position.
    """
    start = ResumePoint()
    for n, file in enumerate(layout.files):
        start.file, start.offset, start.sha256, start.head = n, 0, hashlib.sha256(), b""
        with (folder / file.name).open("rb", buffering=0) as f:
            for part, begin, end in layout.spans(file):
                if isinstance(part, str) and part not in finished:
                    return start
                digest = start.sha256.copy()
                crc = 0
                for at in range(begin, end, BLOCK_BYTES):
                    data = f.read(min(BLOCK_BYTES, end - at))
                    crc = crc32c(data, crc)
                    digest.update(data)
                    yield Progress(
                        start.done + at - begin, layout.total, "reading the interrupted run"
                    )
                if crc != (crc32c(part) if isinstance(part, bytes) else finished[part]):
                    return start
                start.offset, start.sha256 = end, digest
                page = end % ALIGNMENT
                start.head = os.pread(f.fileno(), page, end - page)
                start.done += end - begin
                if isinstance(part, str):
                    start.checksums[part] = crc
        start.digests[file.name] = start.sha256.hexdigest()
    start.file = len(layout.files)
    return start


@dataclass(slots=True)
class _Block:
    """Run of bytes of one file that begins at an aligned offset."""

    memory: np.ndarray
    file: FileLayout
    offset: int
    skip: int
    """Number of bytes at its beginning that the previous block contained, too."""
    spans: list[tuple[str | None, int, bool]] = field(default_factory=list)
    """Tensor (None for other bytes), number of its bytes here, and whether it ends here."""
    finished: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, crc32c and end offset in the file of each tensor that ends in the block."""
    is_last: bool = False
    sha256: str | None = None
    """SHA-256 of the file in hex, set in its last block."""
    end: int = field(init=False)
    """Number of bytes of the memory that are in use."""

    def __post_init__(self) -> None:
        self.end = self.skip


def _lay_out(
    layout: Layout,
    content: Callable[[str], Iterable[Strip]],
    start: ResumePoint,
    buffers: BufferPool,
) -> Iterator[_Block]:
    """Yield the blocks from `start` on, filled but not yet hashed."""
    offset, head = start.offset, start.head
    for file in layout.files[start.file :]:
        block = _Block(buffers.take(), file, offset - len(head), len(head))
        block.memory[: block.skip] = np.frombuffer(head, np.uint8)
        for part, begin, _ in layout.spans(file):
            if begin < offset:
                continue
            name = None if isinstance(part, bytes) else part
            for strip, dtype in _strips(layout, part, content):
                size, at = strip.values.size * dtype.itemsize, 0
                row = _together(strip.row_elements * dtype.itemsize)
                while at < size:
                    room = len(block.memory) - block.end
                    count = size - at if size - at <= room else room // row * row
                    if not count and block.end > block.skip:
                        following, tail = block.offset + block.end, _tail(block)
                        yield block  # hands over its memory
                        block = _Block(buffers.take(), file, following - len(tail), len(tail))
                        block.memory[: block.skip] = tail
                        continue
                    count = count or room  # the row is longer than a block
                    _fill(block.memory[block.end : block.end + count], strip, dtype, at)
                    block.spans.append((name, count, False))
                    block.end += count
                    at += count
            block.spans.append((name, 0, True))
        block.is_last = True
        yield block
        offset, head = 0, b""


def _together(row: int) -> int:
    """Return the number of bytes that are laid out at once, for rows of `row` bytes.

    A row of a transposed matrix is gathered from the whole strip, where one cache line holds values
    of `_ROWS_TOGETHER` neighboring rows.
    """
    fits = (n for n in range(_ROWS_TOGETHER, 1, -1) if n * row <= BLOCK_BYTES and not n & n - 1)
    return next(fits, 1) * row


def _tail(block: _Block) -> np.ndarray:
    """Return a copy of the bytes behind the last page boundary, which the next block writes."""
    return block.memory[block.end - block.end % ALIGNMENT : block.end].copy()


def _strips(
    layout: Layout, part: bytes | str, content: Callable[[str], Iterable[Strip]]
) -> Iterator[tuple[Strip, np.dtype]]:
    """Yield the strips of a part of a file, each with its dtype in the file."""
    if isinstance(part, bytes):
        yield Strip(np.frombuffer(part, np.uint8), Op.COPY), np.dtype(np.uint8)
        return
    dtype = NUMPY[layout.tensors[part].dtype]
    for strip in content(part):
        yield strip, dtype


def _fill(out: np.ndarray, strip: Strip, dtype: np.dtype, begin: int) -> None:
    """Fill memory with bytes of a strip in its new dtype, from byte `begin` on."""
    first, skip = divmod(begin, dtype.itemsize)
    if not skip and out.size % dtype.itemsize == 0:
        strip.fill(out.view(dtype), first)
        return
    # The block ends inside an element.
    whole = np.empty(-(-(skip + out.size) // dtype.itemsize), dtype)
    strip.fill(whole, first)
    out[:] = whole.view(np.uint8)[skip : skip + out.size]


def _hash(blocks: Iterable[_Block], sha256: Any) -> Iterator[_Block]:
    """Set the checksums of tensors and files that end in each block."""
    crc = 0
    for block in blocks:
        at = block.skip
        for name, count, ends in block.spans:
            crc = crc32c(block.memory[at : at + count].data, crc)
            at += count
            if ends:
                if name is not None:
                    block.finished.append((name, crc, block.offset + at))
                crc = 0
        sha256.update(block.memory[block.skip : block.end].data)
        if block.is_last:
            block.sha256 = sha256.hexdigest()
            sha256 = hashlib.sha256()
        yield block
