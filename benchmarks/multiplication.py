"""Time of a training step's matrix products alone, in three libraries: the bound of any speed.

    python benchmarks/multiplication.py [--tokens 512] [--layers 12] [--rounds 10]

The matrices are those of the 125m shape (768 wide, vocabulary 50,400), float32. Each kernel takes
part in three products, as in a step: forward, for the gradient of the input, and for that of the
kernel. Each library runs in its own process; the least time counts. Prints the table of
docs/benchmarks.md: GFLOP/s, and the seconds of all products of a step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

WIDTH, VOCABULARY = 768, 50400
#: Kernels (I, O), and how many of each a block has; the head is there once.
BLOCK = {(WIDTH, WIDTH): 4, (WIDTH, 4 * WIDTH): 1, (4 * WIDTH, WIDTH): 1}
HEAD = (WIDTH, VOCABULARY)

#: x (N, I), kernel (I, O) and gradient (N, O) → the three products.
Products = Callable[[Any, Any, Any], Any]


def pytorch() -> tuple[Callable[[np.ndarray], Any], list[Products]]:
    """Return PyTorch's products, of kernels as its Linear keeps them, (O, I)."""
    import torch

    def products() -> list[Products]:
        return [
            lambda x, w, g: (x @ w.t())[0, 0].item(),
            lambda x, w, g: (g @ w)[0, 0].item(),
            lambda x, w, g: (g.t() @ x)[0, 0].item(),
        ]

    return torch.from_numpy, products()


def tensorflow(compiled: bool) -> tuple[Callable[[np.ndarray], Any], list[Products]]:
    """Return TensorFlow's products, by its own kernels or by XLA's."""
    import tensorflow as tf

    def made(x: Any, w: Any, g: Any, n: int) -> Any:
        if n == 0:
            return tf.matmul(x, w)
        return tf.matmul(g, w, transpose_b=True) if n == 1 else tf.matmul(x, g, transpose_a=True)

    def product(n: int) -> Products:
        run = tf.function(lambda x, w, g: made(x, w, g, n), jit_compile=compiled, autograph=False)
        return lambda x, w, g: float(run(x, w, g)[0, 0])

    return tf.constant, [product(n) for n in range(3)]


LIBRARIES = {
    "PyTorch": pytorch,
    "TensorFlow": lambda: tensorflow(False),
    "TensorFlow, XLA": lambda: tensorflow(True),
}


def measure(library: str, tokens: int, rounds: int) -> dict[str, float]:
    """Return the least seconds of the three products of each kernel, by its shape."""
    tensor, products = LIBRARIES[library]()
    random = np.random.default_rng(0)
    found = {}
    for I, O in (*BLOCK, HEAD):  # noqa: E741
        shape = (O, I) if library == "PyTorch" else (I, O)
        x, w, g = (
            tensor(random.standard_normal(s, np.float32)) for s in ((tokens, I), shape, (tokens, O))
        )
        seconds = 0.0
        for run in products:
            best = np.inf
            for _ in range(rounds + 1):
                begun = time.perf_counter()
                run(x, w, g)
                best = min(best, time.perf_counter() - begun)
            seconds += best
        found[f"{I} × {O}"] = seconds
    return found


def main() -> None:
    """Measure each library in turn and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        print(json.dumps(measure(options.library, options.tokens, options.rounds)))
        return
    counts = [n * options.layers for n in BLOCK.values()] + [1]
    sizes = [6 * options.tokens * i * o for i, o in (*BLOCK, HEAD)]
    best = [np.inf] * len(counts)
    names = [f"{options.tokens} × {i} × {o}" for i, o in (*BLOCK, HEAD)]
    print(f"| GFLOP/s | {' | '.join(names)} | a step's products |")
    print("| --- " * (len(names) + 2) + "|")

    def row(name: str, times: list[float]) -> None:
        rates = " | ".join(f"{s / t / 1e9:.0f}" for s, t in zip(sizes, times, strict=True))
        print(f"| {name} | {rates} | {np.dot(counts, times):.2f} s |", flush=True)

    for library in LIBRARIES:
        command = [sys.executable, __file__, "--library", library]
        command += ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
        done = subprocess.run(command, check=True, capture_output=True)
        times = list(json.loads(done.stdout).values())
        best = list(map(min, best, times))
        row(library, times)
    row("the best of each", best)


if __name__ == "__main__":
    main()
