"""Write docs/cli.md and docs/params.md from the program, and the table of docs/verification.md.

With --check, only report whether they are up to date.
"""

from __future__ import annotations

import inspect
import json
import sys
from itertools import groupby, takewhile
from pathlib import Path

import click
from pydantic.fields import FieldInfo

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are not installed

from runner.cli.shared import framework
from runner.config import params

framework.prepare()

from runner.cli.root import root  # noqa: E402
from runner.cli.shared.command import Command  # noqa: E402
from runner.cli.shared.errors import Exit  # noqa: E402
from tests.cli.corruptions import CASES  # noqa: E402
from tests.cli.mutants import MUTANTS  # noqa: E402

FOLDER = Path(__file__).parent
_BEGIN = "<!-- corruptions: written by `make docs` -->\n"
_END = "<!-- end -->\n"
_MUTANTS_BEGIN = "<!-- mutants: written by `make docs` -->\n"
_MUTANTS_END = "<!-- end of mutants -->\n"

_MEANING = {
    Exit.OK: "done",
    Exit.OPERATIONAL: "could not be done: disk, network, a corrupt file",
    Exit.USAGE: "wrong command line or configuration",
    Exit.MISMATCH: "verification found a difference",
    Exit.INTERRUPTED: "stopped by SIGINT (Ctrl-C)",
    Exit.TERMINATED: "stopped by SIGTERM",
}


def main() -> int:
    """Write or check the pages."""
    pages = {
        FOLDER / "cli.md": page(),
        FOLDER / "params.md": parameters(),
        FOLDER / "verification.md": verification(),
    }
    stale = [path for path, text in pages.items() if _content(path) != text]
    for path in stale:
        if "--check" in sys.argv:
            print(f"{path} is not up to date: run `make docs`", file=sys.stderr)
        else:
            path.write_text(pages[path], encoding="utf-8")
    return 1 if stale and "--check" in sys.argv else 0


def _content(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def verification() -> str:
    """Return the page on verification, with its tables rewritten from the tested cases."""
    before, rest = _content(FOLDER / "verification.md").split(_BEGIN)
    lines = ["| what is done | cases | found by | diagnosis |", "| --- | --- | --- | --- |"]
    for what, group in groupby(CASES, key=lambda case: case.what):
        cases = list(group)
        levels = ", ".join(dict.fromkeys(case.level for case in cases))
        lines.append(f"| {what} | {len(cases)} | {levels} | {cases[0].diagnosis or ''} |")
    page = before + _BEGIN + "\n".join(lines) + "\n" + _END + rest.split(_END)[1]
    before, rest = page.split(_MUTANTS_BEGIN)
    lines = ["| what is changed | named |", "| --- | --- |"]
    for mutant in MUTANTS:
        block = "" if mutant.block is None else f"block {mutant.block}, "
        lines.append(f"| {mutant.what} | {block}{mutant.operation} |")
    return (
        before
        + _MUTANTS_BEGIN
        + "\n".join(lines)
        + "\n"
        + _MUTANTS_END
        + rest.split(_MUTANTS_END)[1]
    )


def parameters() -> str:
    """Return the page on params.yaml, from the classes that check it."""
    lines = [
        "# params.yaml",
        "",
        "Written by `make docs` from the classes that check the file.",
        "",
    ]
    lines += [
        "The keys are the reference's. Numbers may be written `1e-4`. Unknown keys are errors.",
        "`--set SECTION.KEY=VALUE` overrides one value. The values in force are saved as",
        "`model_dir/params.yaml`, which is read again when the run resumes.",
        "",
        "Ready files, under `runner/configs/`:",
        "",
        "| file | for |",
        "| --- | --- |",
    ]
    for path in sorted((FOLDER.parent / "runner" / "configs").glob("*.yaml")):
        comment = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
        about = " ".join(line.removeprefix("# ") for line in list(comment)[:-1])
        lines.append(f"| [{path.name}](../runner/configs/{path.name}) | {about} |")
    sections: list[tuple[str, type[params.Section]]] = [
        ("train_input, eval_input", params.InputParams),
        ("model", params.ModelParams),
        ("model.lora", params.LoraParams),
        ("model.embedding_initializer, initializer, output_layer_initializer", params.Initializer),
        ("optimizer", params.OptimizerParams),
        *((f"optimizer.learning_rate: {name}", s) for name, s in params.SCHEDULES.items()),
        ("runconfig", params.RunConfig),
        ("runconfig.early_stopping", params.EarlyStopping),
    ]
    for title, section in sections:
        lines += ["", f"## {title}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        lines += ["| key | default | meaning |", "| --- | --- | --- |"]
        for key, field in section.model_fields.items():
            meaning = " ".join((field.description or "").split())
            lines.append(f"| `{key}` | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.get_default(call_default_factory=True))}`"


def page() -> str:
    """Return the page on the command line, in Markdown."""
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
    if isinstance(command, Command):
        lines += ["", "Examples:", "", *(f"    {example}" for example in command.examples)]
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
