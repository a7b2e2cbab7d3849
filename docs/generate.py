"""Write docs/cli.md from the commands themselves; with --check, only say if it is up to date."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import click

from runner.cli.errors import Exit
from runner.cli.root import root

TARGET = Path(__file__).parent / "cli.md"

_MEANING = {
    Exit.OK: "done",
    Exit.OPERATIONAL: "could not be done: disk, network, a corrupt file",
    Exit.USAGE: "wrong command line or configuration",
    Exit.MISMATCH: "verification found a difference",
    Exit.INTERRUPTED: "stopped by SIGINT (Ctrl-C)",
    Exit.TERMINATED: "stopped by SIGTERM",
}


def main() -> int:
    """Write or compare the page."""
    text = page()
    if "--check" not in sys.argv:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET} is not up to date: run `make docs`", file=sys.stderr)
    return 1


def page() -> str:
    """The whole page, in Markdown."""
    lines = [
        "# The `gptj` command",
        "",
        "Written by `make docs` from the program itself.",
        "",
        "Results go to stdout, everything else to stderr. `--json` prints exactly one object on",
        "stdout; `--quiet` leaves only results and errors.",
        "",
        "| exit code | meaning |",
        "| --- | --- |",
        *(f"| {code.value} | {_MEANING[code]} |" for code in Exit),
        "",
    ]
    for name, command in sorted(_commands(root, "gptj")):
        lines += _section(name, command)
    return "\n".join(lines)


def _commands(group: click.Group, prefix: str) -> list[tuple[str, click.Command]]:
    found = []
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        if isinstance(command, click.Group):
            found += _commands(command, full)
        else:
            found.append((full, command))
    return found


def _section(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## {name}", "", f"    {name} {usage}", "", inspect.cleandoc(command.help or ""), ""]
    lines += ["| option | meaning |", "| --- | --- |"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record:
            options, meaning = (part.replace("|", r"\|") for part in record)
            lines.append(f"| `{options}` | {' '.join(meaning.split())} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
