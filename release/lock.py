"""Renew requirements.lock: one list of exact versions that serves every supported Python.

    python release/lock.py [--keep] PYTHON [PYTHON ...]

Each PYTHON is an interpreter, such as python3.11. Its pip resolves the extra `dev` of
pyproject.toml, and downloads little more than the packages' metadata. A version that all of them
choose becomes a plain line; where they differ, or not all need the package, the line says for which
Python it is meant. --keep holds the versions of the present lock, for an added dependency; without
it every package becomes the newest that fits.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEADER = """\
# Exact versions of everything that `make setup` installs, direct or not, on Linux.
# Made by `make lock` for Python {pythons}.
"""
#: What builds the project, as `make setup` does without an environment for the build alone.
BUILD = "setuptools"
#: Packages of PyTorch's CUDA build, which pins them itself. The CPU build has none of them.
CUDA = re.compile(r"(nvidia|cuda)-.*|triton")


def canonical(name: str) -> str:
    """Return a package's name as the index spells it, which is how names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(python: str, constraints: list[str]) -> tuple[str, dict[str, str]]:
    """Return an interpreter's version, such as 3.11, and the version of each package it needs."""
    with tempfile.TemporaryDirectory(prefix="gptj-lock-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        ours = str(Path(folder) / "bin" / "python")
        pip = [ours, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        # The first pip of an old interpreter neither reads metadata alone nor resolves as well.
        subprocess.run([*pip, "install", "--upgrade", "pip"], check=True)
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--report", str(report), *constraints]
        subprocess.run([*pip, "install", *options, BUILD, f"{ROOT}[dev]"], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))
    version = ".".join(found["environment"]["python_full_version"].split(".")[:2])
    packages = {
        canonical(item["metadata"]["name"]): item["metadata"]["version"]
        for item in found["install"]
        if "dir_info" not in item["download_info"]  # this project
    }
    # A build of PyTorch is named after a plus sign: which one is the choice of `make setup`.
    return version, {name: v.split("+")[0] for name, v in packages.items() if not CUDA.match(name)}


def lines(resolved: dict[str, dict[str, str]]) -> list[str]:
    """Return the lock's lines for the packages of each Python."""
    pythons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for python, packages in resolved.items():
        for name, version in packages.items():
            pythons[name, version].append(python)
    made = []
    for (name, version), where in sorted(pythons.items()):
        marker = " or ".join(f'python_version == "{python}"' for python in where)
        everywhere = len(where) == len(resolved)
        made.append(f"{name}=={version}" + ("" if everywhere else f" ; {marker}"))
    return made


def main() -> None:
    """Resolve for each interpreter, and write the lock."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", action="store_true", help="hold the versions of the present lock")
    parser.add_argument("pythons", nargs="+", metavar="PYTHON", help="interpreter")
    options = parser.parse_args()
    constraints = ["--constraint", str(LOCK)] if options.keep else []
    resolved: dict[str, dict[str, str]] = {}
    for python in options.pythons:
        try:
            version, packages = resolve(python, constraints)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"{python}: {error}")
        resolved[version] = packages
        print(f"Python {version}: {len(packages)} packages")
    text = HEADER.format(pythons=", ".join(sorted(resolved)))
    LOCK.write_text(text + "\n".join(lines(resolved)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
