"""Ways to transpose a matrix of the 6B's width with numpy, side by side.

    python benchmarks/transposition.py

`gptj_convert.streams.strips` must not be slower than the plain copy of a transposed view.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from gptj_convert.streams.strips import Strip
from gptj_model.op import Op

SIZE = 4096


def rate(work: Callable[[], object], nbytes: int) -> float:
    """Return GB/s of the best of five."""
    best = min(_seconds(work) for _ in range(5))
    return nbytes / best / 1e9


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    values = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32)
    print("| from → to | numpy's copy of the view | gptj_convert.streams.strips |")
    print("| --- | --- | --- |")
    for source in ("float16", "float32"):
        for target in ("float16", "float32"):
            matrix = values.astype(source)
            out = np.empty(matrix.size, target)
            strip = Strip(matrix, Op.TRANSPOSE)
            square = out.reshape(SIZE, SIZE)
            plain = rate(partial(np.copyto, square, matrix.T, casting="unsafe"), out.nbytes)
            ours = rate(partial(strip.fill, out, 0), out.nbytes)
            print(f"| {source} → {target} | {plain:.2f} GB/s | {ours:.2f} GB/s |")
