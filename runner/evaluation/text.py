"""Measure how well a model predicts a text, scoring every token once in sliding windows.

Shape suffixes: B batch, T time, N tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptj_model.errors import DataFault
from runner.data.making.documents.document import Form, Raw
from runner.data.making.text import TextOptions
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator, add_up


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Sliding window over a text that is longer than the model's context."""

    length: int
    """Number of tokens per window."""
    stride: int
    """Number of tokens between the starts of successive windows. Tokens that a window shares with
    the previous one are context only."""
    batch_size: int = 4
    """Number of windows per forward pass."""


def read_text(paths: Sequence[Path], tokenizer: Path) -> tuple[np.ndarray, int]:
    """Return the ids of the texts in one stream, each after an end-of-text, and the texts' bytes.

    Raises:
        DataFault: a file is empty or not UTF-8; with the place.
        FileFault: the tokenizer does not exist or cannot be read.
    """
    encode = TextOptions(tokenizer=tokenizer).open()
    found: list[np.ndarray] = []
    size = 0
    for path in paths:
        encoded = encode([Raw(path.read_bytes(), Form.TEXT, str(path), 1)])
        if encoded.problems:
            raise DataFault(str(encoded.problems[0]), hint="fix the file: a text is used whole")
        if not encoded.bytes:
            raise DataFault(f"{path}: is empty, expected a text")
        # Moves the end-of-text to the front.
        found.append(np.roll(encoded.units.astype(np.int32), 1))
        size += encoded.bytes
    return np.concatenate(found), size


def evaluate_text(
    evaluator: Evaluator,
    ids_N: np.ndarray,
    size: int,
    window: Window,
    report: Callable[[int, int], None] = lambda done, all: None,
) -> dict[str, float]:
    """Return the metrics of `gptj eval` over every token but the first.

    Args:
        evaluator: model to evaluate.
        ids_N: ids of the text, int32.
        size: size of the text in bytes of UTF-8.
        window: sliding window over the text.
        report: called with the numbers of batches done and of all batches.
    """
    batches = list(_batches(ids_N, window))
    found = add_up(evaluator, batches, lambda n: report(n, len(batches)))
    return found.metrics(loss=found.mean, bits_per_byte=found.total / math.log(2) / size)


def _batches(ids_N: np.ndarray, window: Window) -> Iterator[Batch]:
    """Yield windows of equal length, ignoring padding and tokens that were already scored."""
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
        yield ids_BT, ignored_BT, labels_BT
