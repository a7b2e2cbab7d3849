"""Ctrl-C and SIGTERM, which end a run after the step that is going on."""

from __future__ import annotations

import signal
from typing import Any

from runner.cli.shared.errors import Exit


class StopSignals:
    """SIGINT and SIGTERM ask the run to stop after its step; a second one stops it at once."""

    def __init__(self) -> None:
        self.code: Exit | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether a signal has come."""
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
