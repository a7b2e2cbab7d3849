"""Documents into tokens, in several processes, with a result that does not depend on their number.

What the processes get are chunks that the sources alone determine; what they give comes back in
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
from typing import Protocol

import numpy as np
import orjson

from gptj_model.errors import MemoryFault, UsageError
from runner.data.making.long_line import Damaged
from runner.data.making.sources import Problem, Raw, not_utf8

#: Bytes and documents of a chunk.
CHUNK_BYTES = 2**19
CHUNK_DOCUMENTS = 4096

Chunk = list[Raw | Problem]


@dataclass(slots=True)
class Encoded:
    """What a chunk became."""

    units: np.ndarray
    """int32; along its first axis what examples are made of, such as tokens."""
    documents: int = 0
    bytes: int = 0
    """Of text, in UTF-8."""
    tokens: int = 0
    problems: list[Problem] = field(default_factory=list)
    """Documents that could not be taken."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Documents that were left out by a rule, by its name."""


class Encoder(Protocol):
    """Chunks into what examples are made of."""

    def __call__(self, chunk: Chunk) -> Encoded:
        """The chunk's result, which depends on nothing else."""
        ...


def chunks(items: Iterable[Raw | Problem]) -> Iterator[Chunk]:
    """Documents in chunks that they alone determine."""
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
    """An encoder at work, in this process or in several.

    Args:
        open_encoder: makes it, in each process; it is sent there.
        processes: 1 means this one.

    Raises:
        FileFault: what the encoder needs is not there.
    """

    def __init__(self, open_encoder: Callable[[], Encoder], processes: int) -> None:
        self._encoder = open_encoder()  # also to see what is wrong before others start
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
        """The chunks' results, in their order; few chunks are held at a time.

        Raises:
            MemoryFault: a process was ended.
        """
        if self._pool is None:
            yield from map(self._encoder, chunks)
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
                "a process that tokenises was ended from outside, perhaps for lack of memory",
                hint="use fewer with --processes",
            ) from None


_encoder: Encoder


def _begin(open_encoder: Callable[[], Encoder]) -> None:
    """What a new process does first."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what that means
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
    """One a core that this process may use."""
    return len(os.sched_getaffinity(0))


def check_processes(processes: int) -> None:
    """Refuse what no machine has.

    Raises:
        UsageError: more than 16 a core.
    """
    if processes > (most := 16 * default_processes()):
        raise UsageError(f"{processes} processes, expected at most {most} on this machine")


def parse_object(line: bytes) -> object:
    """What a line of JSON holds.

    Raises:
        Damaged: it is not JSON.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as e:
        raise Damaged(f"is not JSON: {e.msg} (column {e.colno})") from None


def problem(item: Raw | Problem, damaged: Damaged) -> Problem:
    """A document's damage with its place."""
    if isinstance(item, Problem):
        return item
    return Problem(f"{item.path}:{item.place + damaged.line}", str(damaged))


def decode(item: Raw) -> str:
    """The text that a document's bytes are.

    Raises:
        Damaged: they are not UTF-8; with the place.
    """
    try:
        return item.data.decode("utf-8")
    except UnicodeDecodeError as e:
        line = item.data.count(b"\n", 0, e.start)
        raise Damaged(not_utf8(e), line=line) from None
