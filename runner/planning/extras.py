"""Which package comes with which extra of this program, and what needs it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata

#: Name of the program on the package index.
DISTRIBUTION = "gptj-tf"
#: TensorFlow without its GPU libraries.
TENSORFLOW_FOR_CPUS = "tensorflow-cpu"


@dataclass(frozen=True, slots=True)
class Package:
    """A package that this program uses."""

    module: str
    """Name of the module."""
    distributions: tuple[str, ...]
    """Names of the distributions that provide it; any will do."""
    needed_for: str
    extra: str = ""
    """Extra that installs it; "" means that every command needs it."""

    @property
    def installed(self) -> str | None:
        """Installed version, if any; nothing is imported."""
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
    Package("jax", ("jax",), f"{_MODEL}, instead of TensorFlow", "jax"),
    Package("tensorboard", ("tensorboard",), "train", "tf"),
    Package("torch", ("torch",), "verify's level logits", "hf"),
    Package("transformers", ("transformers",), "verify's level logits", "hf"),
    Package("pyarrow", ("pyarrow",), "data from parquet", "data"),
    Package("ftfy", ("ftfy",), "data with --ftfy", "data"),
    Package("gigatoken", ("gigatoken",), "data at ten times the speed", "fast"),
    Package("s3fs", ("s3fs",), "records and texts in s3://", "remote"),
    Package("gcsfs", ("gcsfs",), "records and texts in gs://", "remote"),
    Package("rouge_score", ("rouge-score",), "eval --task summarization", "data"),
    Package("lm_eval", ("lm_eval",), "eval --task lm-eval:NAMES", "lm-eval"),
    Package("model_signing", ("model-signing",), "inspect --check --public-key", "sign"),
    Package("OpenSSL", ("pyOpenSSL",), "inspect --check --public-key", "sign"),
    Package("hdf5plugin", ("hdf5plugin",), "checkpoints that the Cerebras client saved", "cs"),
)


def installed_versions() -> Iterator[tuple[str, str | None]]:
    """Yield Python's version and that of each package, or None if it is not installed."""
    yield "Python", platform.python_version()
    for package in PACKAGES:
        yield package.distributions[-1], package.installed


def version_of(distribution: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def install_command(extra: str) -> str:
    """Return the command that installs this program with an extra; "" means none."""
    named = f"[{extra}]" * bool(extra)
    if _from_a_checkout():
        return f"pip install -e '.{named}'"
    return f"pip install '{DISTRIBUTION}{named}'"


@cache
def _from_a_checkout() -> bool:
    """Return whether the program is linked into this environment instead of copied (PEP 610)."""
    found = metadata.distributions(name=DISTRIBUTION)  # building leaves another one behind
    origins = (json.loads(d.read_text("direct_url.json") or "{}") for d in found)
    return any(origin.get("dir_info", {}).get("editable") for origin in origins)


def extra_of(module: str) -> str:
    """Return the extra that installs a module; `all` for one that is not listed here."""
    return next((p.extra for p in PACKAGES if p.module == module.partition(".")[0]), "all")
