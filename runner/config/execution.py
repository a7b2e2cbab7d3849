"""How a model is run, and what computes it: the words of YAML, command line and code.

The standard library only, so that the command line can offer them without loading the rest.
"""

from __future__ import annotations

from enum import StrEnum


class Execution(StrEnum):
    """Where the weights are."""

    RESIDENT = "resident"
    """All of them in memory."""
    STREAMING = "streaming"
    """On the disk, brought one block at a time."""


class Backend(StrEnum):
    """Which of Keras' backends computes."""

    TENSORFLOW = "tensorflow"
    JAX = "jax"
    """Divides a model among devices."""
