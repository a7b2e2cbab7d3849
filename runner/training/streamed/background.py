"""Work that goes on behind a run, in the order in which it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Background:
    """Tasks that a thread does one after the other; once one has failed, no further one is done.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._last: Future[None] | None = None

    def submit(self, task: Callable[..., None], *arguments: Any) -> None:
        """Have a task done behind those before it."""
        self._last = self._thread.submit(_after, self._last, task, arguments)

    def wait(self) -> None:
        """Return once every task is done.

        Raises:
            Exception: what the first task that failed has raised; again at each call.
        """
        if self._last:
            self._last.result()

    def close(self) -> None:
        """Return once every task is done or has failed; closing twice is harmless."""
        self._thread.shutdown()


def _after(before: Future[None] | None, task: Callable[..., None], arguments: Any) -> None:
    if before:
        before.result()  # it is done, as there is one thread; raises what it has raised
    task(*arguments)
