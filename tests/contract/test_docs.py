"""Every command that README and docs show is one that the program takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from runner.cli.root import root
from runner.run import run
from tests.doc_commands import PAGES, blocks

PROGRAMS = {"gptj": root, "runner.run": run}


def _commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line and words of each of our commands in the fenced blocks of a page."""
    fenced, line_number, pending = False, 0, ""
    for n, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
            continue
        text = pending + line.strip().removeprefix("$ ")
        line_number = line_number if pending else n
        pending = text[:-1] + " " if fenced and text.endswith("\\") else ""
        if pending or not fenced:
            continue
        text = re.sub(r"^(\w+='[^']*'|\w+=\S+|srun|exec|time) ", "", text)
        if text.startswith(("gptj ", "python -m runner.run ")) and "…" not in text:
            text = re.sub(r" #.*| [>|&].*", "", text)
            if text.count("'") % 2:  # the end of what a shell was given
                text = text.removesuffix("'")
            yield line_number, shlex.split(text)


def _check(words: list[str]) -> None:
    """Parse a command line without running it."""
    words = words[2:] if words[0] == "python" else words
    command: click.Command = PROGRAMS[words[0]]
    arguments = words[1:]
    while isinstance(command, click.Group):
        if not arguments or arguments[0].startswith("-"):
            return
        name, found, arguments = command.resolve_command(click.Context(command), arguments)
        assert found, name
        command = found
    command.make_context(words[0], arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands(page: Path):
    wrong = []
    for line, words in _commands(page):
        try:
            _check(words)
        except (click.ClickException, click.exceptions.Exit) as e:
            if not isinstance(e, click.exceptions.Exit):
                wrong.append(f"{page.name}:{line}: {shlex.join(words)}: {e.format_message()}")
    assert not wrong, "\n".join(wrong)


def test_commands_are_found():
    found = [words[1] for page in PAGES for _, words in _commands(page)]
    assert {"download", "convert", "verify", "train", "eval", "generate", "data"} <= set(found)
    with pytest.raises(click.ClickException):
        _check(["gptj", "train", "--no-such-option"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_block_says_what_it_needs_or_is_run(page: Path):
    """tests/e2e/test_docs_commands.py runs them, with no program but ours."""
    assert [b.text for b in blocks(page) if b.needs is None and b.programs != {"gptj"}] == []


def test_links_to_pages():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
