"""NVIDIA GPUs of this machine, as their driver's tool lists them; no library is loaded."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

#: Seconds that the driver's tool may take.
_PATIENCE = 10
_QUERY = ("name", "driver_version", "memory.total", "memory.free", "compute_cap")
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; what the tool does not report is None."""

    name: str
    driver: str | None = None
    memory: int | None = None
    """Memory in bytes."""
    free: int | None = None
    """Free memory in bytes."""
    capability: tuple[int, int] | None = None
    """Compute capability, such as (9, 0)."""

    @property
    def has_bfloat16(self) -> bool:
        """Whether the GPU multiplies bfloat16 (capability 8.0, NVIDIA's CUDA programming guide)."""
        return self.capability is not None and self.capability >= (8, 0)


def gpus() -> list[Gpu]:
    """Return all GPUs in the driver's order."""
    tool = shutil.which("nvidia-smi")
    if tool:
        query = (tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE)
            if done.returncode == 0 and done.stdout.strip():
                return [_parse(line) for line in done.stdout.strip().splitlines()]
        except (OSError, subprocess.TimeoutExpired):
            pass
    return [Gpu(p.name) for p in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def _parse(line: str) -> Gpu:
    """Return the GPU in a line of the tool's output, which puts unknown values in brackets or
    leaves them out."""
    name, *rest = (field.strip() for field in line.split(","))
    driver, total, free, capability = (*rest, "", "", "", "")[:4]
    return Gpu(
        name,
        driver if driver[:1].isdigit() else None,
        int(total) * _MIB if total.isdigit() else None,
        int(free) * _MIB if free.isdigit() else None,
        _version(capability),
    )


def _version(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
