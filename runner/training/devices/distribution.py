"""Several processes that train one model on TensorFlow: each holds a copy and computes its share of
a batch.

A few counts are exchanged before a step, so that the loss is the mean over the tokens of the whole
batch, and the gradients after it. TensorFlow exchanges them: through NCCL between GPUs, in a ring
over gRPC between CPUs. TF_CONFIG names the participants, as TensorFlow defines it:

    {"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from crc32c import crc32c

from gptj_model import __version__
from gptj_model.errors import ConfigError, TrainingFault

TF_CONFIG = "TF_CONFIG"
_CHIEF, _WORKER = "chief", "worker"
#: Variables with the number of processes that a launcher has started, by its name.
_LAUNCHERS = {
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}
#: Hosts of a TPU slice, separated by commas.
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"
#: Seconds that workers wait for one another at the start.
PATIENCE = 600.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """Participants, and which of them this process is."""

    addresses: tuple[str, ...]
    index: int

    @property
    def count(self) -> int:
        """Number of participants."""
        return len(self.addresses)


def cluster_here() -> Cluster | None:
    """Return the cluster that TF_CONFIG names; None if the variable is not set.

    Raises:
        ConfigError: it is not as TensorFlow defines it, or names parameter servers.
    """
    text = os.environ.get(TF_CONFIG)
    if not text:
        return None
    try:
        values = json.loads(text)
        groups = {str(name): list(map(str, a)) for name, a in values["cluster"].items()}
        kind, index = str(values["task"]["type"]), int(values["task"]["index"])
        addresses = (*groups.pop(_CHIEF, ()), *groups.pop(_WORKER, ()))
        if groups or kind not in (_CHIEF, _WORKER) or index < 0:
            raise ValueError
        at = index + (len(values["cluster"].get(_CHIEF, ())) if kind == _WORKER else 0)
        addresses[at]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        raise ConfigError(
            f"{TF_CONFIG} is {text[:200]!r}, expected the addresses of the workers, and which of "
            "them this is",
            hint="such as "
            '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, '
            '"task": {"type": "worker", "index": 0}}',
        ) from None
    return Cluster(addresses, at)


def launcher_here() -> str | None:
    """Return what has started this process together with others; None if nothing has."""
    for name, (rank, size) in _LAUNCHERS.items():
        count = os.environ.get(size, "")
        if rank in os.environ and count.isdecimal() and int(count) > 1:
            return name
    return "TPU" if "," in os.environ.get(_TPU_HOSTS, "") else None


class Workers(Protocol):
    """Processes that train one model together."""

    @property
    def index(self) -> int:
        """Index of this process; 0 writes checkpoints and logs."""
        ...

    @property
    def count(self) -> int:
        """Number of processes."""
        ...

    @property
    def decides_together(self) -> bool:
        """Whether all compute one program, evaluation included, so that each must run what the
        first one decides to run."""
        ...

    @property
    def mask_index(self) -> int:
        """Number that tells this worker's dropout masks from those of the others."""
        ...

    def total(self, values: Sequence[float]) -> np.ndarray:
        """Return the sum over all workers of each number, float64.

        Raises:
            TrainingFault: a worker is gone.
        """
        ...

    def add_up(self, variables: Sequence[Any]) -> None:
        """Set each variable to the sum over all workers.

        Raises:
            TrainingFault: a worker is gone.
        """
        ...


class Alone:
    """A single process, which exchanges nothing."""

    index = 0
    count = 1
    decides_together = False
    mask_index = 0

    def total(self, values: Sequence[float]) -> np.ndarray:
        """Return the numbers."""
        return np.asarray(values, np.float64)

    def add_up(self, variables: Sequence[Any]) -> None:
        """Do nothing."""


class Together:
    """One of several processes on TensorFlow.

    Args:
        cluster: cluster of more than one process.
        strategy: TensorFlow's strategy, which knows the others.
    """

    decides_together = False

    def __init__(self, cluster: Cluster, strategy: Any) -> None:
        import tensorflow as tf

        self.index, self.count = cluster.index, cluster.count
        self.mask_index = cluster.index
        self._total = tf.function(lambda values: self._sums(strategy, [values])[0], autograph=False)
        self._add_up: Any = None
        self._strategy = strategy

    def total(self, values: Sequence[float]) -> np.ndarray:
        """Implement `Workers`."""
        import tensorflow as tf

        with _losses_are_faults():
            return self._total(tf.constant(np.asarray(values, np.float64))).numpy()

    def add_up(self, variables: Sequence[Any]) -> None:
        """Implement `Workers`; the variables must be the same at every call."""
        import tensorflow as tf

        if self._add_up is None:

            @tf.function(autograph=False)
            def add_up() -> None:
                sums = self._sums(self._strategy, variables)
                for variable, value in zip(variables, sums, strict=True):
                    variable.assign(value)

            self._add_up = add_up
        with _losses_are_faults():
            self._add_up()

    @staticmethod
    def _sums(strategy: Any, values: Sequence[Any]) -> Any:
        import tensorflow as tf

        def exchange() -> Any:
            context: Any = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.identity(v) for v in values])

        return strategy.run(exchange)


def join(cluster: Cluster | None, waiting: Callable[[str], None]) -> Workers:
    """Connect to the other workers; call it before TensorFlow computes anything.

    Args:
        cluster: cluster to join; None, or one of a single process, stays alone.
        waiting: is told whom it waits for, if that takes long.

    Raises:
        TrainingFault: they do not appear within `PATIENCE`.
    """
    if cluster is None or cluster.count == 1:
        return Alone()
    found: list[Any] = []

    def meet() -> None:
        import tensorflow as tf

        try:
            found.append(tf.distribute.MultiWorkerMirroredStrategy())
        except Exception as e:  # raised again where it is waited for
            found.append(e)

    # TensorFlow waits without a limit, and not even an interrupt ends it.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    begun, told = time.monotonic(), False
    while thread.is_alive():
        thread.join(1)
        passed = time.monotonic() - begun
        if passed > 10 and not told:
            told = True
            waiting(f"waiting for the other workers: {', '.join(cluster.addresses)}")
        if passed > PATIENCE:
            raise TrainingFault(
                f"worker {cluster.index} has waited {PATIENCE:.0f} s for the others of "
                f"{', '.join(cluster.addresses)}",
                hint="start gptj train on each of them, with the same cluster in TF_CONFIG",
            )
    if isinstance(found[0], Exception):
        raise TrainingFault(
            f"worker {cluster.index} cannot join {', '.join(cluster.addresses)}: {found[0]}",
            hint="see that the addresses are right, and that their ports are free",
        )
    return Together(cluster, found[0])


def check_same_run(workers: Workers, parameters: str) -> None:
    """Check that all workers have the same parameters and versions, before they compute.

    Raises:
        TrainingFault: this worker's are not those of the first one.
    """
    found = {"parameters": parameters, **_versions()}
    digests = [float(crc32c(text.encode())) for text in found.values()]
    first = workers.total([d if workers.index == 0 else 0.0 for d in digests])
    others = [
        name for name, own, theirs in zip(found, digests, first, strict=True) if own != theirs
    ]
    if workers.total([bool(others)])[0]:
        named = [f"{n} {found[n]}" if n != "parameters" else n for n in others]
        what = (
            f"has other {', '.join(named)} than" if others else "is not alone: others differ from"
        )
        raise TrainingFault(
            f"worker {workers.index} {what} the first worker",
            hint="run the same command with the same installation and files on each of them",
        )


def _versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {name: version(name) for name in ("jax", "jaxlib", "keras", "numpy")} | {
        "gptj": __version__
    }


def check_same(workers: Workers, values: Sequence[float]) -> bool:
    """Return whether all workers hold the same numbers; each of them learns it."""
    first = workers.total([v if workers.index == 0 else 0.0 for v in values])
    differs = not np.array_equal(first, np.asarray(values, np.float64))
    return not workers.total([differs])[0]


@contextmanager
def _losses_are_faults() -> Iterator[None]:
    import tensorflow as tf

    lost = (
        tf.errors.UnavailableError,
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
        tf.errors.InternalError,
        tf.errors.UnknownError,
    )
    try:
        yield
    except lost as e:
        reason = next(iter(str(e.message).strip().splitlines()), "")
        raise TrainingFault(
            f"another worker is gone: {reason}",
            hint="start all of them again: the run resumes from its last checkpoint",
        ) from None
