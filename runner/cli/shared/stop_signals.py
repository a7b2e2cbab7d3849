"""Ctrl-C and SIGTERM, which end a run after its current step."""

from __future__ import annotations

import signal
from typing import Any

from runner.cli.shared.errors import Exit


class StopSignals:
    """Handler of SIGINT and SIGTERM: the first stops the run after its step, a second one at
    once."""

    def __init__(self) -> None:
        self.code: Exit | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Return whether a signal has arrived."""
        return self.code is not None

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        self.code = Exit.INTERRUPTED if number == signal.SIGINT else Exit.TERMINATED
        self.__exit__()
