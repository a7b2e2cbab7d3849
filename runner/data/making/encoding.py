"""Encode documents in several processes, with a result that does not depend on their number.

The sources alone determine the chunks that the processes receive, and the results are returned in
the order of the chunks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Protocol, runtime_checkable

import numpy as np
import orjson

from gptj_convert.streams.pipeline import Pipeline
from gptj_model.errors import MemoryFault, UsageError
from runner.data.making.documents.document import Problem, Raw, not_utf8, where
from runner.data.making.long_line import Damaged

#: Number of bytes, and number of documents, that complete a chunk.
CHUNK_BYTES = 2**19
CHUNK_DOCUMENTS = 4096
#: Number of encoded chunks that wait for the caller; one may hold a document of 8 MiB.
_AHEAD = 3

#: Reason for leaving out a document that is longer than an example.
TOO_LONG = "too long"

Chunk = list[Raw | Problem]


@dataclass(slots=True)
class Encoded:
    """Result of encoding a chunk."""

    units: np.ndarray
    """Units that examples are built from, such as tokens, along the first axis; int32 or
    uint16."""
    documents: int = 0
    bytes: int = 0
    """Size of the text in UTF-8."""
    tokens: int = 0
    problems: list[Problem] = field(default_factory=list)
    """Documents that could not be read."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of documents that a rule left out, by the name of the rule."""
    cut: int = 0
    """Number of documents that were cut to the length of an example."""
    special_names: int = 0
    """Number of names of special tokens in the texts that were read as text."""
    shapes: dict[str, int] = field(default_factory=dict)
    """Number of documents by their shape, where documents have one."""


class Encoder(Protocol):
    """Turns chunks into the units that examples are built from."""

    def __call__(self, chunk: Chunk) -> Encoded:
        """Return the result of a chunk, which depends on the chunk alone."""
        ...


@runtime_checkable
class ThreadedEncoder(Encoder, Protocol):
    """An encoder that may do its work without the interpreter lock."""

    @property
    def needs_no_process(self) -> bool:
        """Whether sending a chunk to another process takes longer than encoding it."""
        ...


def chunks(items: Iterable[Raw | Problem]) -> Iterator[Chunk]:
    """Yield the documents in chunks that depend on the documents alone."""
    chunk: Chunk = []
    size = 0
    for item in items:
        chunk.append(item)
        size += len(item.data) if isinstance(item, Raw) else 0
        if size >= CHUNK_BYTES or len(chunk) == CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Encoding:
    """Runs an encoder in threads of this process, or in several others.

    Args:
        open_encoder: factory of the encoder; it is pickled and called in every process.
        processes: number of processes; 1 means this process alone, None leaves it to the encoder:
            this process alone if it needs no other, else one for each core.

    Raises:
        FileFault: a file that the encoder needs does not exist.
    """

    def __init__(self, open_encoder: Callable[[], Encoder], processes: int | None) -> None:
        self._encoder = open_encoder()  # a fault shows here, before other processes start
        if processes is None:
            threads = isinstance(self._encoder, ThreadedEncoder) and self._encoder.needs_no_process
            processes = 1 if threads else default_processes()
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            self._pool = ProcessPoolExecutor(
                processes,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(open_encoder,),
            )

    def __enter__(self) -> Encoding:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, chunks: Iterable[Chunk]) -> Iterator[Encoded]:
        """Yield the results in the order of the chunks, with few chunks in memory at a time.

        Raises:
            MemoryFault: one of the processes was killed.
        """
        if self._pool is None:
            with Pipeline() as pipeline:  # reads and encodes while the caller writes
                yield from pipeline.prefetch(map(self._encoder, chunks), depth=_AHEAD)
            return
        waiting: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                waiting.append(self._pool.submit(_encode, chunk))
                if len(waiting) > 2 * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise MemoryFault(
                "a tokenizer process was killed, perhaps for lack of memory",
                hint="use fewer processes with --processes",
            ) from None


_encoder: Encoder


def _begin(open_encoder: Callable[[], Encoder]) -> None:
    """Initialize a worker process."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = open_encoder()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode(chunk: Chunk) -> Encoded:
    return _encoder(chunk)


def default_processes() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_processes(processes: int) -> None:
    """Check that the number of processes is sensible for this machine.

    Raises:
        UsageError: there are more than 16 processes per core.
    """
    if processes > (most := 16 * default_processes()):
        raise UsageError(f"{processes} processes, expected at most {most} on this machine")


def parse_object(line: bytes) -> object:
    """Return the value of a line of JSON.

    Raises:
        Damaged: it is not JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as e:
        # The parser may name the end of the data, which is past the last line.
        lines = line.rstrip().count(b"\n")
        raise Damaged(
            f"is not JSON: {e.msg} (column {e.colno})", line=min(e.lineno - 1, lines)
        ) from None


def problem(item: Raw | Problem, damaged: Damaged) -> Problem:
    """Return the damage of a document as a problem with its place."""
    if isinstance(item, Problem):
        return item
    place = where(item.path, item.place + damaged.line, item.after)
    return Problem(place, str(damaged), damaged.hint, damaged.reason)


def decode(item: Raw) -> str:
    """Return a document's bytes as text.

    Raises:
        Damaged: the bytes are not UTF-8; the text of the error has the offset.
    """
    try:
        return item.data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = item.data.count(b"\n", 0, e.start)
        raise Damaged(not_utf8(e), line=line) from None
