"""Work in the background of a run, in the order in which it is submitted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Tasks that one thread runs one after the other; once one fails, the others are dropped.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._last: Future[None] | None = None

    def submit(self, task: Callable[..., None], *arguments: Any) -> None:
        """Run a task after those submitted before it."""
        self._last = self._thread.submit(_after, self._last, task, arguments)

    def wait(self) -> None:
        """Return once every task is done.

        Raises:
            Exception: the error of the first task that failed, again at each call.
        """
        if self._last:
            self._last.result()

    def close(self) -> None:
        """Return once every task is done or has failed; closing twice is harmless."""
        self._thread.shutdown()


def _after(before: Future[None] | None, task: Callable[..., None], arguments: Any) -> None:
    if before:
        before.result()  # done already, as there is one thread; raises the task's error
    task(*arguments)
