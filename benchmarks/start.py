"""Seconds that a command waits for TensorFlow or JAX, beside importing them plainly.

    python benchmarks/start.py [--rounds 7]

Each round starts a new process for either side, in turn; the first round fills the page cache and
does not count. With few other packages installed there is less to leave out, and the gain is
smaller.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from statistics import median

PLAIN = "import {0}, keras"
OURS = "from runner.cli.shared import framework; framework.prepare(backend='{0}')"


def seconds(program: str, backend: str) -> float:
    """Return how long a process runs that only imports."""
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_ENABLE_ONEDNN_OPTS": "0"}
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", program.format(backend)],
        env=environment,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - begun


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print("| | plain import | gptj | ratio |\n| --- | --- | --- | --- |")
    for backend in ("tensorflow", "jax"):
        found = [[seconds(side, backend) for side in (PLAIN, OURS)] for _ in range(rounds + 1)]
        plain, ours = (median(side) for side in zip(*found[1:], strict=True))
        print(f"| {backend} | {plain:.2f} s | {ours:.2f} s | {ours / plain:.2f} |", flush=True)


if __name__ == "__main__":
    main()
