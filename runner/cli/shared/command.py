"""What every command is made of: --json, --quiet, its rules, and its result as one object."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import click as click_core
import rich_click as click

from gptj_convert.resources.machine import peak_rss
from runner.cli.shared.errors import Exit
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.output import Output, notes_of_core

#: Both spellings, because a command may be a program of its own.
_HELP = {"help_option_names": ["-h", "--help"]}


class Command(click.RichCommand):
    """A command with examples and rules.

    Args:
        examples: command lines that the help ends with.
        rules: which options go together.
        strangers: words of other programs' command lines, each with what it means there.
    """

    def __init__(
        self,
        *args: Any,
        examples: tuple[str, ...] = (),
        rules: OptionRules | None = None,
        strangers: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.rules = rules or OptionRules()
        self.strangers = strangers or {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; a word of another program is explained.

        Raises:
            click.UsageError: the command line is wrong.
        """
        if args and (meaning := self.strangers.get(args[0])):
            raise click.UsageError(f"{args[0]!r} {meaning}", ctx)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, one per line."""
        from rich.text import Text

        if self.examples:
            lines = "".join(f"\n   {example}" for example in self.examples)
            formatter.write(Text.assemble((" Examples:", "bold"), lines, "\n"))


def command(
    *examples: str, rules: OptionRules | None = None, strangers: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Mapping[str, Any]]], Command]:
    """Return a decorator that makes a command of `(output, **options) -> fields of its JSON`.

    A field `exit` (an `Exit`) is the exit code and is not printed; `ok` follows from it.

    Args:
        examples: command lines that the help ends with.
        rules: which options go together; checked before the function is called.
        strangers: words of other programs' command lines, each with what it means there.
    """

    def make(function: Callable[..., Mapping[str, Any]]) -> Command:
        @functools.wraps(function)
        def run(**options: Any) -> Exit:
            begun = time.monotonic()
            output = Output(json=options.pop("json"), quiet=options.pop("quiet"))
            if rules:
                rules.check(click_core.get_current_context())
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
        run = click.option("--quiet", is_flag=True, help="Print only errors and results.")(run)
        return click.command(
            cls=Command,
            context_settings=_HELP,
            examples=examples,
            rules=rules,
            strangers=strangers,
        )(run)

    return make


def note_memory(output: Output, planned: int | None) -> None:
    """Note the peak memory that was measured beside the one that was planned, in bytes."""
    measured = peak_rss()
    if measured and planned:
        output.note(f"memory: {measured / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB")


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Return `--set KEY=VALUE` options as a mapping; values are read as YAML 1.2.

    Raises:
        click.UsageError: a pair has no key or no `=`, or its value is not YAML.
    """
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
            raise click.UsageError(f"--set {key}: {value!r} is not a valid YAML value") from None
    return found
