"""The two generations of the client of a CS system."""

from __future__ import annotations

from enum import Enum


class Target(Enum):
    """Generation of the client of a CS system."""

    CSX = "csx"
    """`cszoo fit|validate trainer.yaml` of model zoo 2.10."""
    LEGACY = "legacy"
    """The reference's run.py in the vendor's container, releases 1.6 to 1.9."""
