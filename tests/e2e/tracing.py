"""Processes whose system calls are recorded, fail, or are their last, with strace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

needs_strace = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "strace -V"], capture_output=True).returncode != 0,
    reason="needs strace",
)

#: The command line, once it is loaded.
COMMAND = "from runner.cli.root import main; sys.exit(main())"
#: Stops before what is traced: a traced process is far slower, and importing makes thousands of
#: calls.
#: 0x59616d61 is PR_SET_PTRACER: any process may trace this one.
_PROGRAM = """
import ctypes, os, signal, sys
import runner.cli.root
{before}
ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1))
os.kill(os.getpid(), signal.SIGSTOP)
{run}
"""


@contextmanager
def started(
    *arguments: str, calls: str, inject: str = "", before: str = "", run: str = COMMAND
) -> Iterator[subprocess.Popen[str]]:
    """Start a Python process under strace, which writes ./trace, and wait for its end.

    Args:
        arguments: arguments of the program.
        calls: names of the system calls that are traced, separated by commas.
        inject: what is done at one of them, as strace's `inject` has it.
        before: Python code that is run before the tracing begins, such as imports.
        run: Python code that is traced.
    """
    code = _PROGRAM.format(before=before, run=run)
    options = ["-e", f"trace={calls}", "-e", "signal=none", "-e", "quiet=exit"]
    options += ["-e", f"inject={inject}"] if inject else []
    with subprocess.Popen(
        [sys.executable, "-B", "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        with subprocess.Popen(
            ["strace", "-f", "-y", "-o", "trace", *options, "-p", str(process.pid)],
            stderr=subprocess.PIPE,
            text=True,
        ) as strace:
            assert strace.stderr
            told = strace.stderr.readline()
            if "attached" not in told:
                process.kill()
                pytest.fail(f"{told} {process.communicate()}")
            process.send_signal(signal.SIGCONT)
            yield process
            strace.communicate()


def traced(
    *arguments: str, calls: str, inject: str = "", before: str = "", run: str = COMMAND
) -> subprocess.CompletedProcess[str]:
    """Run a Python process under strace to its end; see `started`."""
    with started(*arguments, calls=calls, inject=inject, before=before, run=run) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
