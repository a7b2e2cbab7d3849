"""Stages of a long stream, each in a thread of its own, in order and in bounded memory.

numpy, hashlib, crc32c and the system's reads and writes let go of the interpreter while they
work, so the stages really run at once.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

import numpy as np

from gptj_model.page_buffers import page_memory

T = TypeVar("T")

#: Seconds for which a stage that computes may keep the interpreter from one whose read or write
#: has ended, in place of Python's 5 ms. Measured on 28 November 2026, 2 cores with AVX-512, by
#: benchmarks/conversion.py: 4.5 s became 3.7 s for 2.4 GB that are copied.
_SWITCH_INTERVAL = 5e-4
#: Seconds after which a waiting stage looks whether the others have ended.
_GLANCE = 0.1


class Stopped(Exception):
    """Another stage has ended the stream."""


class Pipeline:
    """Threads and memory of one stream. Leaving the context ends all stages."""

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
        """The items, made in another thread up to `depth` before they are taken.

        An exception of theirs is raised here, in its place.
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
        """The next item of a queue.

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
        """Add to a queue once it has room.

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
    """Follows the last item."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class BufferPool:
    """Memory that goes around, touched only once; see `page_memory`.

    Args:
        pipeline: whose end also ends waiting here.
        count: of buffers.
        size: of each, in bytes.

    Raises:
        MemoryFault: the system does not give it.
    """

    def __init__(self, pipeline: Pipeline, count: int, size: int) -> None:
        self._pipeline = pipeline
        self._free: queue.Queue[np.ndarray] = queue.Queue(count)
        for memory in page_memory(count, size):
            self._free.put(memory)

    def take(self) -> np.ndarray:
        """A buffer that nobody uses: uint8, writable.

        Raises:
            Stopped: the stream has ended.
        """
        return self._pipeline.get(self._free)

    def give(self, buffer: np.ndarray) -> None:
        """It is no longer used."""
        self._free.put_nowait(buffer)
