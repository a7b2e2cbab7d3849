"""The two generations of a CS system's client."""

from __future__ import annotations

from enum import Enum


class Target(Enum):
    """A generation of the client."""

    CSX = "csx"
    """`cszoo fit|validate trainer.yaml` of the model zoo 2.10."""
    LEGACY = "legacy"
    """The reference's own run.py in the vendor's container, releases 1.6 to 1.9."""
