"""Build the kit for a GPU machine without a network: `make gpu-kit`.

    python gpu/kit.py [OUT]

OUT (default build/gpu-kit) gets the sources that `gpu/run.sh` needs, and wheels for CPython 3.12 on
x86-64 of what that machine lacks. It brings Python 3.12, JAX 0.11 with CUDA 13, PyTorch 2.11,
transformers, peft, accelerate, numpy, h5py, ml-dtypes, safetensors, tokenizers, rich, click,
Jinja2, absl-py, packaging, typing_extensions and typing-inspection.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Largest size of the kit in bytes: 60 MiB.
LIMIT = 60 * 2**20
#: Packages that the machine lacks and that JAX runs import; each in the version of the lock.
PACKAGES = (
    "annotated-types",
    "backports-zstd",
    "crc32c",
    "keras",
    "namex",
    "optree",
    "orjson",
    "pydantic",
    "pydantic-core",
    "rich-click",
    "ruamel-yaml",
)
#: What is run there.
SOURCES = (
    "gptj_model",
    "golden",
    "gptj_convert",
    "runner",
    "benchmarks/accelerator.py",
    "gpu",
    "tests/golden_runs/adamw",
    "LICENSE",
    "pyproject.toml",
)
_PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_12", "2_5")


def versions() -> dict[str, str]:
    """Return the versions of the lock by name."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = (line.partition(" ;")[0] for line in lines if not line.startswith("#"))
    return dict(pin.split("==") for pin in pins)


def download(out: Path) -> None:
    """Download the wheels."""
    locked = versions()
    pinned = [f"{name}=={locked[name]}" for name in PACKAGES]
    tags = [f"--platform=manylinux_{one}_x86_64" for one in _PLATFORMS]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp",
         *tags, "--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64",
         f"--dest={out}", *pinned],
        check=True,
    )  # fmt: skip


def copy_sources(out: Path) -> None:
    """Copy the sources as they are in the working tree, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *SOURCES],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, out / name)


def main() -> int:
    """Build the kit and print its size; 1 if it is too large."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/gpu-kit"
    shutil.rmtree(out, ignore_errors=True)
    (out / "wheels").mkdir(parents=True)
    download(out / "wheels")
    copy_sources(out)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {size / 2**20:.1f} MiB, limit {LIMIT / 2**20:.0f}; run {out}/gpu/run.sh there")
    return 0 if size <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
