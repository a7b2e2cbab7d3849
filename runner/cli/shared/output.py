"""The one sink of the program's output: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from gptj_convert.inspection.json_numbers import json_number
from gptj_model.errors import FileFault, GptjError


class Output:
    """Output for people, with `--json` for programs, or with `--quiet`.

    With json, stdout carries exactly one object, written by `finish` or `fail`.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet

    def data(self, text: str) -> None:
        """Print a line of the result, verbatim; only a terminal shows control characters as
        escapes."""
        if not self.json:
            _print(text)

    def part(self, text: str) -> None:
        """Print a part of a line of the result; `data` ends the line."""
        if not self.json:
            _print(text, end="")

    def record(self, fields: Mapping[str, Any]) -> None:
        """Print a line of the result as a JSON object."""
        if not self.json:
            _print(json_line(fields, getattr(sys.stdout, "encoding", None) or "utf-8"))

    def coloured(self, pieces: Iterable[tuple[str, str]]) -> None:
        """Print a line of the result in pieces with their styles, with colors on a terminal that
        has them."""
        if self.json:
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(soft_wrap=True, highlight=False)
        if not console.is_terminal:
            _print("".join(text for text, _ in pieces))
            return
        sys.stdout.flush()
        with _encoding_known():
            console.print(Text.assemble(*((visible(text), style) for text, style in pieces)))

    def note(self, text: str) -> None:
        """Print a note on stderr."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def finish(self, fields: Mapping[str, Any]) -> None:
        """Print the JSON object, if one was asked for; NaN and infinities become words."""
        if self.json:
            print(json.dumps(_with_json_numbers(fields), default=str), flush=True)

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


def _with_json_numbers(value: Any) -> Any:
    """Return JSON values in which every number can be written."""
    if isinstance(value, Mapping):
        return {key: _with_json_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_json_numbers(inner) for inner in value]
    return json_number(value) if isinstance(value, float) else value


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


def _print(text: str, end: str = "\n") -> None:
    shown = _without_surrogates(text)
    if sys.stdout is not None and sys.stdout.isatty():
        shown = visible(shown)
    with _encoding_known():
        print(shown, end=end, flush=True)


@contextmanager
def _encoding_known() -> Generator[None]:
    """Report a character that stdout cannot hold.

    Raises:
        FileFault: the encoding of stdout has no such character.
    """
    try:
        yield
    except UnicodeEncodeError as e:
        character = e.object[e.start]
        raise FileFault(
            f"stdout has the encoding {e.encoding}, which has no U+{ord(character):04X}",
            hint="set PYTHONIOENCODING=utf-8, or give --json, which escapes such characters",
        ) from None


#: Controls of writing direction, which make a line look like another one.
_DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")
#: Control characters: C0 but tab and newline, DEL and C1.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
#: What ends a line somewhere.
_BREAK = re.compile("[\t\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
#: What json.dumps leaves as it is, and readers of lines or terminals may not.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def json_line(fields: Mapping[str, Any], encoding: str) -> str:
    """Return a JSON object as one line that every encoding of stdout can hold."""
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False)
    text = _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(fields, allow_nan=False)
    return text


def visible(text: str) -> str:
    """Return the text with control characters as escapes, except tabs and newlines: a terminal
    would obey them."""
    return _CONTROL.sub(_escaped, _without_surrogates(text))


def printable(text: str) -> str:
    """Return the text of a note or an error with everything as escapes that could make it look like
    another one, because names in files may hold anything."""
    return _BREAK.sub(_escaped, _DIRECTION.sub(_escaped, visible(text)))


def one_line(text: str, limit: int = 400) -> str:
    """Return a name from a file as one line: `printable`, without newlines, and cut to `limit`."""
    shown = printable(text).replace("\n", "\\x0a")
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _without_surrogates(text: str) -> str:
    """Return the text with bytes of a name that are not UTF-8 as escapes: no encoding has them."""
    return _SURROGATE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return f"\\x{ord(found[0]):02x}"
