"""Runs in processes of their own, followed by what they print."""

from __future__ import annotations

import subprocess
import sys

import pytest

GPTJ = (sys.executable, "-m", "runner.cli.root")


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the program."""
    command = [*GPTJ, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], step: int) -> str:
    """Return what a process has written to stderr when it has printed a step."""
    seen = ""
    assert process.stderr
    for line in process.stderr:
        seen += line
        if line.startswith("step") and int(line.split()[1].split("/")[0]) >= step:
            return seen
    pytest.fail(seen)


def ended(process: subprocess.Popen[str]) -> str:
    """Return what else a process writes to stderr until its end."""
    assert process.stderr
    rest = process.stderr.read()
    process.wait(timeout=60)
    return rest
