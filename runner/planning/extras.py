"""Which package comes with which extra of this program, and what needs it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata

#: How the program is called on the package index.
DISTRIBUTION = "gptj-tf"
#: TensorFlow without what it needs for GPUs.
TENSORFLOW_FOR_CPUS = "tensorflow-cpu"


@dataclass(frozen=True, slots=True)
class Package:
    """A package that this program uses."""

    module: str
    """As it is imported."""
    distributions: tuple[str, ...]
    """As they are installed; any will do."""
    needed_for: str
    extra: str = ""
    """That installs it; without one every command needs it."""

    @property
    def installed(self) -> str | None:
        """Its version, if it is there; nothing is imported."""
        found = (version_of(name) for name in self.distributions)
        return next((version for version in found if version), None)


_CORE = "every command"
_MODEL = "verify's level logits, train, eval, generate"
PACKAGES = (
    Package("numpy", ("numpy",), _CORE),
    Package("ml_dtypes", ("ml-dtypes",), _CORE),
    Package("crc32c", ("crc32c",), _CORE),
    Package("ruamel", ("ruamel.yaml",), _CORE),
    Package("h5py", ("h5py",), _CORE),
    Package("tokenizers", ("tokenizers",), _CORE),
    Package("huggingface_hub", ("huggingface_hub",), _CORE),
    Package("tensorflow", (TENSORFLOW_FOR_CPUS, "tensorflow"), _MODEL, "tf"),
    Package("keras", ("keras",), f"{_MODEL}; convert --to keras", "tf"),
    Package("pydantic", ("pydantic",), "train, eval", "tf"),
    Package("jax", ("jax",), "train --backend jax", "jax"),
    Package("torch", ("torch",), "verify's level logits", "hf"),
    Package("transformers", ("transformers",), "verify's level logits", "hf"),
    Package("pyarrow", ("pyarrow",), "data from parquet", "data"),
    Package("ftfy", ("ftfy",), "data with --ftfy", "data"),
    Package("rouge_score", ("rouge-score",), "eval --task summarization", "data"),
    Package("hdf5plugin", ("hdf5plugin",), "checkpoints that the Cerebras client saved", "cs"),
)


def installed_versions() -> Iterator[tuple[str, str | None]]:
    """Python's version, and that of each package; None: it is not installed."""
    yield "Python", platform.python_version()
    for package in PACKAGES:
        yield package.distributions[-1], package.installed


def version_of(distribution: str) -> str | None:
    """Of a package as it is installed; None: it is not."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def install_command(extra: str) -> str:
    """What installs this program with an extra; "" means none."""
    named = f"[{extra}]" * bool(extra)
    if _from_a_checkout():
        return f"pip install -e '.{named}'"
    return f"pip install '{DISTRIBUTION}{named}'"


@cache
def _from_a_checkout() -> bool:
    """Whether it is linked, not copied, into this environment (PEP 610)."""
    found = metadata.distributions(name=DISTRIBUTION)  # what building leaves behind is one, too
    origins = (json.loads(d.read_text("direct_url.json") or "{}") for d in found)
    return any(origin.get("dir_info", {}).get("editable") for origin in origins)


def extra_of(module: str) -> str:
    """The extra that brings a module; `all` for one that is not named here."""
    return next((p.extra for p in PACKAGES if p.module == module.partition(".")[0]), "all")
