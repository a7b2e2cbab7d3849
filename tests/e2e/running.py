"""Runs in processes of their own, followed by what they print."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from threading import Timer

import pytest

GPTJ = (sys.executable, "-m", "runner.cli.root")


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the program, as the first process of a group."""
    return subprocess.Popen(
        [*GPTJ, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


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
    """Return what else a process writes to stderr until its end, which is forced after a minute."""
    assert process.stderr
    limit = Timer(60, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    try:
        return process.stderr.read()
    finally:
        limit.cancel()
        process.wait()
