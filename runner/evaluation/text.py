"""How well a model predicts a text: every token once, each after as many others as a window has.

Shape suffixes: B batch, T time, N tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from gptj_model.errors import DataFault
from runner.data.making.sources import Form, Raw
from runner.data.making.text import TextOptions
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator, add_up


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """How a text that is longer than the model's context is read."""

    length: int
    """Tokens that are read together."""
    stride: int
    """From one window to the next. A window's tokens that the last one had too are context only."""
    batch_size: int = 4
    """Windows that are computed together."""


def read_text(paths: Sequence[Path], tokenizer: Path) -> tuple[np.ndarray, int]:
    """The texts of files as one stream of ids, end-of-text before each, and their bytes.

    Raises:
        DataFault: one is not UTF-8 or empty; with its place.
        FileFault: there is no tokenizer.
    """
    encode = TextOptions(tokenizer=tokenizer).open()
    found: list[np.ndarray] = []
    size = 0
    for path in paths:
        encoded = encode([Raw(path.read_bytes(), Form.TEXT, str(path), 1)])
        if encoded.problems:
            raise DataFault(str(encoded.problems[0]), hint="mend it: a text is taken whole")
        if not encoded.bytes:
            raise DataFault(f"{path}: is empty, expected a text")
        found.append(np.roll(encoded.units, 1))  # the end of the text is what a text begins after
        size += encoded.bytes
    return np.concatenate(found), size


def evaluate_text(
    evaluator: Evaluator,
    ids_N: np.ndarray,
    size: int,
    window: Window,
    report: Callable[[int, int], None] = lambda done, all: None,
) -> dict[str, float]:
    """The metrics of `gptj eval`, over every token but the first.

    Args:
        evaluator: of the model.
        ids_N: int32.
        size: bytes of the text.
        window: how it is read.
        report: is told how many batches of windows are done, and how many there are.
    """
    batches = list(_batches(ids_N, window))
    found = add_up(evaluator, batches, lambda n: report(n, len(batches)))
    return found.metrics(loss=found.mean, bits_per_byte=found.total / math.log(2) / size)


def _batches(ids_N: np.ndarray, window: Window) -> Iterator[Batch]:
    """Windows of equal length; what was scored, and padding, does not count."""
    labels = len(ids_N) - 1
    T, B = min(window.length, labels), window.batch_size
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    scored = 0
    for start in range(0, labels, window.stride):
        stop = min(start + T, labels)
        begin = stop - T  # the last window is as long as the others
        ignored_T = (np.arange(begin, stop) < scored).astype(np.float32)
        rows.append((ids_N[begin:stop], ignored_T, ids_N[begin + 1 : stop + 1]))
        scored = stop
        if stop == labels:
            break
    nothing = rows[0][0], np.ones(T, np.float32), rows[0][2]
    rows += [nothing] * (-len(rows) % B)
    for at in range(0, len(rows), B):
        ids_BT, ignored_BT, labels_BT = map(np.stack, zip(*rows[at : at + B], strict=True))
        yield tf.constant(ids_BT), tf.constant(ignored_BT), tf.constant(labels_BT)
