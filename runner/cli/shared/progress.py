"""Progress events drawn: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from runner.cli.shared.output import Output, one_line

#: Seconds between lines where there is no terminal.
LINE_EVERY = 30.0
#: Letters that are shown of what is at work, which may be a name from a file.
_WHAT = 64


class Report(Protocol):
    """Takes the state of the work: how much is done, of how much, and at what it is."""

    def __call__(self, done: float, total: float, what: str) -> None:
        """Take the present state."""
        ...


@contextmanager
def progress(output: Output, title: str, *, in_bytes: bool = True) -> Iterator[Report]:
    """A reporter to call as often as one likes."""
    if output.live:
        with _bar(title, in_bytes) as report:
            yield report
    else:
        yield _lines(output, title)


@contextmanager
def _bar(title: str, in_bytes: bool) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    units = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn(title), BarColumn(), *units, TimeRemainingColumn())
    last = TextColumn("{task.fields[what]}", style="dim", markup=False)
    with Progress(*columns, last, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, what="")

        def report(done: float, total: float, what: str) -> None:
            bar.update(task, completed=done, total=total, what=one_line(what, _WHAT))

        yield report


def _lines(output: Output, title: str) -> Report:
    begun = last = time.monotonic()
    kept: float | None = None  # done before, by an interrupted run, which says nothing of the pace

    def report(done: float, total: float, what: str) -> None:
        nonlocal begun, last, kept
        now = time.monotonic()
        if kept is None:
            begun, kept = now, done
        if now - last < LINE_EVERY:
            return
        last = now
        new = done - kept
        left = f", {(now - begun) * (total - done) / new:.0f} s to go" if new > 0 else ""
        at = f"{100 * done / max(total, 1):.0f} % ({one_line(what, _WHAT)})"
        output.note(f"{title}: {at}{left}")

    return report
