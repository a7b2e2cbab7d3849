"""The one sink of the program's output: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptj_model.errors import GptjError

if TYPE_CHECKING:
    from rich.text import Text


class Output:
    """Output for people, with `--json` for programs, or with `--quiet`.

    With json, stdout carries exactly one object, written by `finish` or `fail`.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def data(self, text: str) -> None:
        """Print a line of the result."""
        if not self.json:
            print(printable(text), flush=True)

    def part(self, text: str) -> None:
        """Print a part of a line of the result; `data` ends the line."""
        if not self.json:
            print(printable(text), end="", flush=True)

    def coloured(self, text: Text) -> None:
        """Print a line of the result, with colors on a terminal that has them."""
        if not self.json:
            from rich.console import Console

            sys.stdout.flush()
            Console(soft_wrap=True, highlight=False).print(text)

    def note(self, text: str) -> None:
        """Print a note on stderr."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def finish(self, fields: Mapping[str, Any]) -> None:
        """Print the JSON object, if one was asked for."""
        if self.json:
            print(json.dumps(fields, allow_nan=False, default=str), flush=True)

    def fail(self, fault: GptjError, fields: Mapping[str, Any]) -> None:
        """Print a fault and its hint, also in the JSON object if one was asked for."""
        error = {"kind": fault.kind, "message": fault.message, "hint": fault.hint}
        try:
            self.finish({"ok": False, **fields, "error": error})
        except OSError:
            abandon_stdout()
        self.say_fault(fault)

    def say_fault(self, fault: GptjError) -> None:
        """Print a fault and its hint on stderr."""
        print(printable(f"error: {fault.message}"), file=sys.stderr)
        if fault.hint:
            print(printable(f"hint: {fault.hint}"), file=sys.stderr)
        sys.stderr.flush()

    @property
    def live(self) -> bool:
        """Whether progress bars may be drawn."""
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class _Notes(logging.Handler):
    """Prints each message that the core logs once, as a note."""

    def __init__(self, output: Output) -> None:
        super().__init__(logging.INFO)
        self._output = output
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()) not in self._said:
            self._said.add(text)
            self._output.note(f"note: {text}")


@contextmanager
def notes_of_core(output: Output) -> Generator[None]:
    """Print what `gptj_convert` logs while the context is open: what it ignores, alters or
    guesses."""
    logger, handler = logging.getLogger("gptj_convert"), _Notes(output)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def abandon_stdout() -> None:
    """Discard stdout, which nobody reads or which is full, so that no second failure follows at
    exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """Return the text with control characters escaped, because names in files may contain escape
    codes."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def one_line(text: str, limit: int = 400) -> str:
    """Return a name from a file as one line: without control characters, and cut to `limit`."""
    shown = printable(text).replace("\n", "\\x0a")
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
