"""The house rules of docs/words.md, as far as a program can hold them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from runner import run as reference
from runner.cli.root import root

PACKAGES = ("gptj_model", "golden", "gptj_convert", "runner")
MODULES = [p for package in PACKAGES for p in sorted(Path(package).rglob("*.py"))]
#: Openings that lean on the name beside them instead of naming their object.
LEANING = ("Of ", "The same", "Likewise", "There;", "There.", "Theirs")
#: Words that have a plainer one in docs/words.md.
AVOIDED = re.compile(r"\b(anew|gone on with|so many|goes on with)\b")
LONGEST = 60


def _docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.lineno, node.value.value
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.lstrip().startswith("#: "):
            yield number, line.lstrip().removeprefix("#: ")


def _helps(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    yield name, command.help or ""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield f"{name} {parameter.opts[0]}", parameter.help or ""
    if isinstance(command, click.Group):
        for sub, inner in command.commands.items():
            yield from _helps(inner, f"{name} {sub}")


HELPS = [*_helps(root, "gptj"), *_helps(reference.run, "run.py")]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_docstrings_name_their_object(path: Path):
    leaning = [(n, text) for n, text in _docstrings(path) if text.startswith(LEANING)]
    assert leaning == []


@pytest.mark.parametrize(("name", "text"), HELPS, ids=[name for name, _ in HELPS])
def test_help_is_a_whole_phrase(name: str, text: str):
    assert len(text.split()) >= 3
    assert not text.startswith(LEANING)
    assert not AVOIDED.search(text)


def _is_command(function: ast.FunctionDef) -> bool:
    return any("command" in ast.unparse(d) for d in function.decorator_list)


def _length(function: ast.FunctionDef) -> int:
    """Return the number of lines of a function without its docstring."""
    first = function.body[0]
    docstring = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_functions_are_short():
    long = [
        f"{path}:{node.lineno} {node.name}: {_length(node)} lines"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and not _is_command(node) and _length(node) > LONGEST
    ]
    assert long == []


def test_rooms_are_small():
    full = {
        str(folder): len(modules)
        for package in PACKAGES
        for folder in (Path(package), *(p for p in Path(package).rglob("*") if p.is_dir()))
        if len(modules := [p for p in folder.glob("*.py") if p.name != "__init__.py"]) > 13
    }
    assert full == {}
