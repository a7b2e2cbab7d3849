"""Several workers on this machine: the same command once per worker, as one cluster."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from gptj_convert.resources import machine
from gptj_convert.resources.gpu import gpus
from gptj_model.errors import TrainingFault
from runner.cli.shared.errors import Exit
from runner.training.devices.distribution import TF_CONFIG

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_THREADS = "TF_NUM_INTRAOP_THREADS"
#: Seconds that the other workers have to end once one has failed.
_GRACE = 30.0
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA names them."""
    named = os.environ.get(_VISIBLE)
    if named is not None:
        return [name for name in named.split(",") if name and name != "-1"]
    return [str(n) for n in range(len(gpus()))]


def run_workers(count: int) -> int:
    """Run this process's own command in `count` processes, one GPU each if there are GPUs.

    The first process inherits stdout. Signals are forwarded; when one process fails, the others get
    time to end.

    Returns:
        0 if all succeed, else the exit code of the first that fails.
    """
    visible = visible_gpus()
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    processes = [_start(n, addresses, visible) for n in range(count)]

    def forward(number: int, frame: object) -> None:
        for process in processes:
            process.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(processes)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(index: int, addresses: Sequence[str], visible: Sequence[str]) -> subprocess.Popen[Any]:
    cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    environment = os.environ | {TF_CONFIG: json.dumps(cluster)}
    if visible:
        environment[_VISIBLE] = visible[index % len(visible)]
    else:
        environment.setdefault(_THREADS, str(max(1, int(machine.cores()) // len(addresses))))
    return subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=environment,
        stdout=subprocess.DEVNULL if index else None,
        process_group=0,  # Ctrl-C reaches only this process, which forwards it once
        preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGTERM)


def _stuck(processes: Sequence[subprocess.Popen[Any]]) -> TrainingFault:
    """Kill the workers that wait for one that has ended, and return the fault."""
    first = next(n for n, p in enumerate(processes) if p.returncode)
    code = processes[first].returncode
    for process in processes:
        process.kill()
        process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return TrainingFault(
        f"worker {first} {how}, and the others did not end within {_GRACE:.0f} s",
        hint="run the same command again: the run resumes from its last checkpoint",
    )


def _wait(processes: Sequence[subprocess.Popen[Any]]) -> int:
    failed, deadline = int(Exit.OK), 0.0
    while None in [p.poll() for p in processes]:  # each is asked, the dead ones too
        bad = next((p.returncode for p in processes if p.returncode), 0)
        if bad and not failed:
            failed, deadline = bad, time.monotonic() + _GRACE
        if failed and time.monotonic() > deadline:
            raise _stuck(processes)
        time.sleep(0.2)
    code = failed or next((p.returncode for p in processes if p.returncode), 0)
    return code if code >= 0 else int(Exit.OPERATIONAL)
