"""Progress drawn: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from runner.cli.shared.errors import Terminated
from runner.cli.shared.output import Output, one_line

if TYPE_CHECKING:
    from gptj_convert.streams.progress import Work

T = TypeVar("T")

#: Seconds between lines where there is no terminal.
LINE_EVERY = 30.0
#: Characters shown of the item in work, which may be a name from a file.
_WHAT = 64


class Report(Protocol):
    """Takes the state of the work: how much is done, of how much, and the item in work."""

    def __call__(self, done: float, total: float, what: str) -> None:
        """Take the present state."""
        ...


def follow(
    output: Output,
    title: str,
    work: Work[T],
    *,
    in_bytes: bool = True,
    resumable: Callable[[], bool] = lambda: False,
) -> T:
    """Run work to its end, show its progress, and return its result.

    Args:
        output: sink of the progress.
        title: what is being done, such as "converting".
        work: generator of `Progress`; it is closed whatever happens.
        in_bytes: whether progress counts bytes, so that a rate can be shown.
        resumable: whether the output holds work that `--resume` would reuse; asked when the work
            ends early, whose error then says so.
    """
    begun = False
    try:
        with progress(output, title, in_bytes=in_bytes) as report, closing(work):
            while True:
                try:
                    event = next(work)
                except StopIteration as end:
                    return end.value
                begun = True
                report(event.done, event.total, event.what)
    except BaseException as e:
        stopped = isinstance(e, KeyboardInterrupt | Terminated)
        if (begun or stopped) and resumable():
            e.add_note("run the same command with --resume to reuse what is done")
        raise


@contextmanager
def progress(output: Output, title: str, *, in_bytes: bool = True) -> Iterator[Report]:
    """Show progress that is reported by calls, as often as the caller likes."""
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
    reused: float | None = None  # work of an interrupted run, which tells nothing about the pace

    def report(done: float, total: float, what: str) -> None:
        nonlocal begun, last, reused
        now = time.monotonic()
        if reused is None:
            begun, reused = now, done
        if now - last < LINE_EVERY:
            return
        last = now
        new = done - reused
        left = f", {(now - begun) * (total - done) / new:.0f} s to go" if new > 0 else ""
        at = f"{100 * done / max(total, 1):.0f} % ({one_line(what, _WHAT)})"
        output.note(f"{title}: {at}{left}")

    return report
