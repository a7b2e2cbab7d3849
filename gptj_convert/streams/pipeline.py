"""Stages of a long stream, each in a thread of its own, in order and in bounded memory.

numpy, hashlib, crc32c and system calls release the interpreter lock while they work, so the stages
run in parallel.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

import numpy as np

from gptj_model.page_buffers import page_buffers

T = TypeVar("T")

#: Seconds for which a computing stage may keep the interpreter lock from a stage whose read or
#: write has ended, instead of Python's 5 ms. Measured 2026-11 on a 2-core AVX-512 machine by
#: benchmarks/conversion.py: copying 2.4 GB took 3.7 s instead of 4.5 s.
_SWITCH_INTERVAL = 5e-4
#: Seconds between a waiting stage's checks whether the stream has ended.
_GLANCE = 0.1


class Stopped(Exception):
    """Signal that another stage has ended the stream."""


class Pipeline:
    """Threads of one stream. Leaving the context ends all stages."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._interval = sys.getswitchinterval()

    def __enter__(self) -> Pipeline:
        sys.setswitchinterval(_SWITCH_INTERVAL)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setswitchinterval(self._interval)
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def prefetch(self, items: Iterable[T], depth: int) -> Iterator[T]:
        """Yield items that another thread produces in advance.

        An exception of the producer is raised here, in its place among the items.

        Args:
            items: producer, which is iterated over in the other thread.
            depth: largest number of items that wait to be taken.
        """
        made: queue.Queue[T | _End] = queue.Queue(depth)

        def make() -> None:
            error: BaseException | None = None
            try:
                for item in items:
                    self.put(made, item)
            except BaseException as e:
                error = e
            if not isinstance(error, Stopped):
                self.put(made, _End(error))

        def run() -> None:
            with suppress(Stopped):
                make()

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        while not isinstance(item := self.get(made), _End):
            yield item
        if item.error:
            raise item.error

    def get(self, source: queue.Queue[T]) -> T:
        """Return the next item of a queue.

        Raises:
            Stopped: the stream has ended.
        """
        while not self._stop.is_set():
            try:
                return source.get(timeout=_GLANCE)
            except queue.Empty:
                continue
        raise Stopped

    def put(self, target: queue.Queue[T], item: T) -> None:
        """Add an item to a queue once it has room.

        Raises:
            Stopped: the stream has ended.
        """
        while not self._stop.is_set():
            try:
                return target.put(item, timeout=_GLANCE)
            except queue.Full:
                continue
        raise Stopped


class _End:
    """Mark behind the last item, with the exception that ended the producer."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class BufferPool:
    """Pool of buffers of one size, whose pages the system provides only once; see `page_buffers`.

    Args:
        pipeline: stream that uses the buffers; its end also ends waiting for one.
        count: number of buffers.
        size: size of each buffer, in bytes.

    Raises:
        MemoryFault: the system has not enough memory.
    """

    def __init__(self, pipeline: Pipeline, count: int, size: int) -> None:
        self._pipeline = pipeline
        self._free: queue.Queue[np.ndarray] = queue.Queue(count)
        for memory in page_buffers(count, size):
            self._free.put(memory)

    def take(self) -> np.ndarray:
        """Return a free buffer (writable, uint8), waiting for one if necessary.

        Raises:
            Stopped: the stream has ended.
        """
        return self._pipeline.get(self._free)

    def give(self, buffer: np.ndarray) -> None:
        """Return a buffer to the pool."""
        self._free.put_nowait(buffer)
