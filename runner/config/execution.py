"""Names of execution modes and backends, shared by YAML, command line and code.

Imports the standard library only, so that the command line can offer the names at once.
"""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec


class Execution(StrEnum):
    """Where the weights are kept."""

    RESIDENT = "resident"
    """All weights are in memory."""
    STREAMING = "streaming"
    """The weights are on disk, and one block at a time is in memory."""


class Backend(StrEnum):
    """Keras backend that computes."""

    TENSORFLOW = "tensorflow"
    """TensorFlow."""
    JAX = "jax"
    """JAX, which can divide a model among devices."""


def default_backend() -> Backend:
    """Return TensorFlow where it is installed, else JAX."""
    return Backend.TENSORFLOW if find_spec("tensorflow") else Backend.JAX
