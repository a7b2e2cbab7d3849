"""The machine and the libraries that something was measured or proven on, in words."""

from __future__ import annotations

import platform
from importlib import metadata

from gptj_convert.resources import machine
from gptj_model import __version__

#: Distributions whose versions may affect what a model computes.
LIBRARIES = ("numpy", "tensorflow", "tensorflow-cpu", "keras", "torch", "transformers")


def describe() -> dict[str, str]:
    """Return facts by name; libraries that are not installed are left out."""
    facts = {
        "gptj": __version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{machine.cpu_name()}, {machine.cores():g} cores",
        "memory": f"{machine.memory_total() / 1e9:.0f} GB",
    }
    return facts | library_versions()


def library_versions() -> dict[str, str]:
    """Return the versions of those of `LIBRARIES` that are installed; none is imported."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
