"""Several processes that run one program of JAX over the devices of all of them.

Each process holds its devices' parts of the arrays and reads its rows of every batch. JAX finds the
others by itself under Slurm, Open MPI, Kubernetes and on TPUs; elsewhere TF_CONFIG names them, of
which the first one is the coordinator.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptj_model.errors import ConfigError, TrainingFault
from runner.training.devices.chatter import without_chatter
from runner.training.devices.distribution import PATIENCE, TF_CONFIG, Alone, Cluster, Workers

#: What the errors of a lost process say, by gloo, NCCL and JAX's coordinator.
_SIGNS_OF_LOSS = ("Gloo", "gloo", "NCCL", "Connection reset", "Connection closed", "coordination")
#: Seconds without a sign of life after which JAX takes a process for dead, and ends the others.
_HEARTBEAT = 60


class Processes:
    """One of several processes that compute together."""

    decides_together = True
    mask_index = 0
    """The masks of a whole batch are drawn by one program."""

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()

    def total(self, values: Sequence[float]) -> np.ndarray:
        """Implement `Workers`."""
        # JAX computes in 32 bits; halves of float64 pass through it unchanged.
        halves = np.asarray(values, np.float64).view(np.uint32)
        gathered = np.asarray(multihost_utils.process_allgather(halves))
        return gathered.view(np.float64).reshape(self.count, -1).sum(axis=0)

    def add_up(self, variables: Sequence[Any]) -> None:
        """Do nothing: gradients are added up by the program."""


def join_processes(cluster: Cluster | None, waiting: Callable[[str], None]) -> Workers:
    """Connect to the other processes; call it before JAX computes anything.

    Args:
        cluster: processes to join; None lets JAX find them.
        waiting: is told whom it waits for, if that takes long.

    Raises:
        ConfigError: JAX does not find the others.
        TrainingFault: they do not appear within `PATIENCE`, or the coordinator is not reached.
    """
    if cluster and cluster.count == 1:
        return Alone()
    named: dict[str, Any] = {}
    if cluster:
        named = {
            "coordinator_address": cluster.addresses[0],
            "num_processes": cluster.count,
            "process_id": cluster.index,
        }
    who = ", ".join(cluster.addresses) if cluster else "the other processes"
    timer = threading.Timer(10, waiting, [f"waiting for {who}"])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **named,
            initialization_timeout=int(PATIENCE),
            heartbeat_timeout_seconds=_HEARTBEAT,
            # A process that fails does not wait for the others.
            shutdown_timeout_seconds=5,
        )
    except ValueError as e:
        raise ConfigError(
            f"JAX does not find the processes of this run: {e}",
            hint=f"set {TF_CONFIG} on each of them, or start one process with "
            "--set runconfig.multiple_workers=false",
        ) from None
    except RuntimeError as e:
        raise TrainingFault(
            f"cannot join {who}: {_first_line(e)}",
            hint="start gptj train on each of them; see that the addresses are right, and that "
            "their ports are free",
        ) from None
    finally:
        timer.cancel()
    if jax.process_count() == 1:
        return Alone()
    joined = Processes()
    with without_chatter(1):  # gloo says there who is connected, and stdout is kept for results
        joined.total([0.0])
    return joined


@contextmanager
def ending_alone(code_of: Callable[[BaseException], int]) -> Iterator[None]:
    """Let a process that fails end at once, with the exit code of its fault.

    JAX would wait for the other processes at the end, and abort if one of them is gone.

    Raises:
        TrainingFault: in place of an error of JAX that the loss of another process causes.
    """
    try:
        with _losses_are_faults():
            yield
    except BaseException as e:
        # What is registered last runs first.
        atexit.register(_end, code_of(e))
        raise


def _end(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream:
            with suppress(OSError):
                stream.flush()
    os._exit(code)


@contextmanager
def _losses_are_faults() -> Iterator[None]:
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        # Whatever exchanges something may find that another process is gone.
        if not any(sign in str(e) for sign in _SIGNS_OF_LOSS):
            raise
        raise TrainingFault(
            f"another worker is gone: {_first_line(e)}",
            hint="start all of them again: the run resumes from its last checkpoint",
        ) from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
