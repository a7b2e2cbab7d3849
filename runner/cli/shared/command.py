"""What every command shares: --json, --quiet, and its result as one object."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rich_click as click

from gptj_convert.options import parse_bytes
from gptj_convert.resources.machine import peak_rss
from runner.cli.shared.errors import Exit
from runner.cli.shared.output import Output, notes_of_core

#: A path argument as pathlib gives it.
PATH = click.Path(path_type=Path)


#: What an option `--config` takes.
CONFIG_HELP = "config.json, params.yaml or the CS client's YAML of the model"


class _ByteSize(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_bytes(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


#: A number of bytes with an optional unit.
SIZE = _ByteSize()


#: Both spellings, also where a command is a program of its own.
_HELP = {"help_option_names": ["-h", "--help"]}


def command(function: Callable[..., Mapping[str, Any]]) -> click.Command:
    """Make a command of a function `(output, **options) -> fields of its JSON object`.

    A field `exit` (an `Exit`) is the exit code and is not printed; `ok` follows from it.
    """

    @functools.wraps(function)
    def run(**options: Any) -> Exit:
        begun = time.monotonic()
        output = Output(json=options.pop("json"), quiet=options.pop("quiet"))
        with notes_of_core(output):
            fields = dict(function(output, **options))
        code = fields.pop("exit", Exit.OK)
        measured = {
            "seconds": round(time.monotonic() - begun, 3),
            "peak_rss_bytes": peak_rss(),
        }
        output.finish({"ok": code is Exit.OK, **fields, **measured})
        return code

    run = click.option("--json", is_flag=True, help="Print one JSON object on stdout.")(run)
    run = click.option("--quiet", is_flag=True, help="Print errors and results only.")(run)
    return click.command(context_settings=_HELP)(run)


def note_memory(output: Output, planned: int | None) -> None:
    """Say what memory was taken, and what was planned."""
    measured = peak_rss()
    if measured and planned:
        output.note(f"memory: {measured / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB")


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`--set KEY=VALUE` options as a mapping; values are read as YAML 1.2."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--set takes KEY=VALUE, found {pair!r}")
        try:
            found[key] = YAML(typ="safe", pure=True).load(value)
        except YAMLError:
            raise click.UsageError(f"--set {key}: {value!r} is not a value") from None
    return found
