"""Facts about this machine that matter to the program; nothing heavy is imported."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from gptj_convert.resources import machine
from gptj_convert.resources.gpu import Gpu, gpus
from runner.planning.extras import PACKAGES, TENSORFLOW_FOR_CPUS, install_command, version_of


class State(Enum):
    """How a fact is rated."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that this machine has or lacks."""

    name: str
    value: str
    state: State = State.OK
    needed_for: str = ""
    fix: str = ""
    """Command that fixes it, or what else does."""
    core: bool = False
    """Whether every command needs it."""


_OLDEST_PYTHON = (3, 11)
#: CPU features by Linux's names, and what they speed up.
_FEATURES = (
    (("avx2",), "AVX2", "TensorFlow and torch"),
    (("avx512f",), "AVX-512", "TensorFlow and torch, up to twice as fast as with AVX2"),
    *(
        ((name,), f"{dtype} on CPU", f"mixed_{dtype}")
        for dtype, name in machine.HALF_PRECISION.items()
    ),
    (("sha_ni", "sha2"), "SHA extensions", "convert and download, which hash every byte"),
)
_CEREBRAS = ("cszoo", "csrun_wse")


def examine() -> list[Fact]:
    """Yield every fact, in the order of interest."""
    return [*_software(), *_hardware(), *_disk(), *_hub(), *_cerebras()]


def _software() -> Iterator[Fact]:
    version = platform.python_version()
    if sys.version_info >= _OLDEST_PYTHON:
        yield Fact("Python", version, core=True)
    else:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        fix = f"install Python {oldest} or newer"
        yield Fact("Python", version, State.MISSING, "every command", fix, core=True)
    for package in PACKAGES:
        found = package.installed
        state = State.OK if found else State.MISSING
        fix, core = install_command(package.extra), not package.extra
        name = package.distributions[-1]
        yield Fact(name, found or "", state, package.needed_for, fix, core=core)


def _hardware() -> Iterator[Fact]:
    yield Fact("processor", machine.cpu_name() or platform.machine())
    yield Fact("cores", f"{machine.cores():g}")
    features = machine.cpu_features()
    for names, shown, speeds_up in _FEATURES:
        if features.isdisjoint(names):
            yield Fact(shown, "not there", State.WARNING, f"speed of {speeds_up}")
        else:
            yield Fact(shown, "there")
    total, available = machine.memory_total(), machine.memory_available()
    yield Fact("memory", f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB")
    yield from _gpus()


def _gpus() -> Iterator[Fact]:
    found = gpus()
    if not found:
        yield Fact("GPUs", "none, and none is needed")
        return
    for n, gpu in enumerate(found):
        yield Fact(f"GPU {n}", _described(gpu))
    if all(gpu.has_bfloat16 for gpu in found):
        yield Fact("bfloat16 on GPU", "there")
    else:
        fix = "--set model.mixed_precision_dtype=float16"
        yield Fact("bfloat16 on GPU", "not there", State.WARNING, "mixed_bfloat16", fix)
    if version_of(TENSORFLOW_FOR_CPUS):
        fix = f"pip uninstall {TENSORFLOW_FOR_CPUS}; {install_command('gpu')}"
        value = f"not there: {TENSORFLOW_FOR_CPUS} is installed"
        yield Fact("TensorFlow on GPU", value, State.WARNING, "the speed of the model", fix)


def _described(gpu: Gpu) -> str:
    """Return name, memory, driver and capability of a GPU."""
    parts = [gpu.name]
    if gpu.memory is not None:
        free = f"{gpu.free / 1e9:.1f} GB free of " if gpu.free is not None else ""
        parts.append(f"{free}{gpu.memory / 1e9:.1f} GB")
    if gpu.driver:
        parts.append(f"driver {gpu.driver}")
    if gpu.capability:
        parts.append("compute capability {}.{}".format(*gpu.capability))
    return ", ".join(parts)


def _disk() -> Iterator[Fact]:
    here = Path()
    kind = machine.file_system(here) or "unknown file system"
    yield Fact("disk", f"{machine.disk_free(here) / 1e9:.1f} GB free in this folder ({kind})")
    try:
        direct = machine.direct_io(here)
    except OSError as e:
        fix = "work in a folder of your own"
        value = f"this folder cannot be written: {e.strerror}"
        yield Fact("direct I/O", value, State.WARNING, "every output", fix)
        return
    if direct:
        yield Fact("direct I/O", "there")
    else:
        fix = "work in a folder on ext4 or xfs"
        yield Fact("direct I/O", "not there", State.WARNING, "the speed of convert", fix)


def _hub() -> Iterator[Fact]:
    endpoint = os.environ.get("HF_ENDPOINT")
    # A URL may hold a password.
    yield Fact("hub endpoint", "set by HF_ENDPOINT" if endpoint else "the public one")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Fact(
            "hub", "HF_HUB_OFFLINE is set", State.WARNING, "download", "unset HF_HUB_OFFLINE"
        )
    there = _has_token()
    yield Fact("hub token", "there" if there else "none, and none is needed for GPT-J-6B")


def _has_token() -> bool:
    """Return whether the hub's client will find a token; the token is not read."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    return path.is_file()


def _cerebras() -> Iterator[Fact]:
    for tool in _CEREBRAS:
        found = shutil.which(tool)
        if found:
            yield Fact(tool, found)
        else:
            fix = "install Cerebras' Model Zoo" if tool == "cszoo" else "run on a Cerebras cluster"
            yield Fact(tool, "", State.WARNING, "training on Cerebras' machines only", fix)
