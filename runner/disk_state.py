"""Weights and slots of a run that are on the disk: read by ranges, and written anew each step.

The state of a step is an ordinary checkpoint. The next one is written beside it while it is read,
and takes over when all of it is durable: as everything changes in a step, this writes no more
than an update in place would, and there is a whole state at every instant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from gptj_convert.formats.bundle import BundleSource
from gptj_convert.pipeline import Pipeline
from gptj_model.config import GPTJConfig
from gptj_model.source import TensorInfo, read_rows
from gptj_model.tensors import Scheme, Tensor, block, table
from runner import checkpoints
from runner.update_rule import UpdateRule

#: Elements that are updated at once, but for a longer row: 8 MiB of each of weight, gradient and
#: slots.
PIECE = 2**21
#: The least size that a program of the update is compiled for; others are powers of two.
_LEAST = 2**10

Rows = Callable[[int, int], np.ndarray]
"""Rows start:stop of an array in Keras' layout (elements, of a vector), float32."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one tensor that are updated at once."""

    tensor: Tensor
    old: list[np.ndarray]
    """Of the weight, then of its slots."""
    gradient: np.ndarray | None
    """None: the weight stays."""


class DiskState:
    """The state that is read, and the draft of the next one.

    Args:
        config: of the model.
        rule: of the update.
        trained: rows of the table that are updated; the others are copied.
        model_dir: where states are written.
    """

    def __init__(
        self, config: GPTJConfig, rule: UpdateRule, trained: Sequence[Tensor], model_dir: Path
    ) -> None:
        self._config = config
        self._rule = rule
        self._slots = {t: rule.slots(t) for t in trained}
        self._model_dir = model_dir
        self._source: BundleSource | None = None
        self._has_slots = False
        self._draft: checkpoints.Draft | None = None
        self._superseded: int | None = None
        self._programs: dict[float, Any] = {}

    @property
    def tensors(self) -> list[Tensor]:
        """Every weight."""
        return table(self._config)

    @property
    def trained(self) -> Container[Tensor]:
        """Those that are updated."""
        return self._slots.keys()

    @property
    def source(self) -> BundleSource:
        """The tensors of the present state."""
        assert self._source, "a state was opened"
        return self._source

    def open(self, prefix: Path, *, has_slots: bool = False) -> None:
        """Read from this bundle from now on: float32, names and layout of TF."""
        self.close()
        self._source = BundleSource(prefix)
        self._has_slots = has_slots

    def take_slots(self) -> bool:
        """Go on with the slots of the bundle that is open; False if it lacks some."""
        known = self.source.tensors
        self._has_slots = all(name in known for names in self._slots.values() for name in names)
        return self._has_slots

    def begin(self, weights: Iterable[tuple[Tensor, Any]]) -> None:
        """Write a first state, of step 0 and without slots, and open it.

        Args:
            weights: every tensor's values, in TF's layout.
        """
        infos = {t.tf: _info(t) for t in table(self._config)}
        with closing(checkpoints.Draft(self._model_dir, infos)) as draft:
            for tensor, values in weights:
                draft.append(tensor.tf, np.asarray(values).astype(np.float32, copy=False))
            self.open(draft.publish(0))
        checkpoints.retain(self._model_dir, keep=0)
        self._superseded = 0

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of a weight; see `Rows`."""
        return read_rows(self.source, tensor.tf, start, stop)

    def blocks(
        self, order: Iterable[int], load: Callable[[Sequence[np.ndarray]], None]
    ) -> Iterator[int]:
        """Numbers of blocks whose weights were loaded; the next one's are read meanwhile.

        Args:
            order: of the blocks.
            load: takes the weights of one, and does not keep the arrays.
        """
        numbers = list(order)
        with ThreadPoolExecutor(1, "read") as reader:
            coming = [reader.submit(self._block, i) for i in numbers[:1]]
            for n, i in enumerate(numbers, start=1):
                load(coming.pop().result())
                coming += [reader.submit(self._block, j) for j in numbers[n : n + 1]]
                yield i

    def _block(self, i: int) -> list[np.ndarray]:
        return [self.rows(t) for t in block(self._config, i)]

    def update(
        self, work: Iterable[tuple[Tensor, Rows | None]], norm: float, rate: float, correction: Any
    ) -> None:
        """Write tensors and their slots into the draft of the next state.

        Args:
            work: each tensor with its gradient; None: it is copied.
            norm: of all gradients, if the rule clips by it.
            rate: of learning.
            correction: see `BetaPowers`.
        """
        if self._draft is None:
            infos = {t.tf: _info(t) for t in table(self._config)}
            infos |= {name: _info(t) for t, names in self._slots.items() for name in names}
            self._draft = checkpoints.Draft(self._model_dir, infos)
        scalars = [tf.constant(x, tf.float32) for x in (norm, rate, correction)]
        with Pipeline() as pipeline:
            read = pipeline.ahead(self._read(work), depth=1)
            new = pipeline.ahead((self._updated(piece, scalars) for piece in read), depth=1)
            for names, arrays in new:
                for name, values in zip(names, arrays, strict=True):
                    self._draft.append(name, values)

    def discard(self) -> None:
        """The update is not to be: the present state stays."""
        if self._draft:
            self._draft.close()
        self._draft = None

    def commit(self, step: int, scalars: Mapping[str, np.ndarray], *, stays: bool, keep: int):
        """Make the draft the present state, durably; without one, that state may come to stay.

        Args:
            step: that it is of.
            scalars: further tensors of the checkpoint.
            stays: whether it is kept when the next one takes over.
            keep: how many checkpoints are kept.
        """
        if self._draft:
            final = self._draft.publish(step, scalars)
            self.discard()
            self.open(final, has_slots=True)
            checkpoints.retain(self._model_dir, keep=keep, superseded=self._superseded)
        self._superseded = None if stays else step

    def close(self) -> None:
        """Close the files; closing twice is harmless."""
        if self._source:
            self._source.close()
        self._source = None

    def _read(self, work: Iterable[tuple[Tensor, Rows | None]]) -> Iterator[_Piece]:
        for tensor, gradient in work:
            for start, stop in pieces(tensor):
                old = [self.rows(tensor, start, stop)]
                for name, fill in self._slots.get(tensor, {}).items():
                    if self._has_slots:
                        old.append(read_rows(self.source, name, start, stop))
                    else:
                        old.append(np.full(old[0].shape, fill, np.float32))
                yield _Piece(tensor, old, gradient and gradient(start, stop))

    def _updated(self, piece: _Piece, scalars: list) -> tuple[list[str], list[np.ndarray]]:
        """Names and new parts of a weight and its slots."""
        names = [piece.tensor.tf, *self._slots.get(piece.tensor, ())]
        if piece.gradient is None:
            return names, piece.old
        size = piece.gradient.size
        arrays = [_padded(x) for x in (piece.gradient, *piece.old)]
        new = self._program(self._rule.decay(piece.tensor))(arrays, *scalars)
        return names, [x.numpy()[:size] for x in new]

    def _program(self, decay: float) -> Any:
        """The update of one piece, compiled: gradient, weight and slots → weight and slots."""
        if decay not in self._programs:

            def run(arrays, norm, rate, correction):
                gradient, w, *slots = arrays
                gradient = self._rule.clipped(gradient, norm)
                if not slots:
                    return self._rule.take(gradient, [w], rate)
                new = self._rule.take(gradient, slots, rate)
                return [self._rule.move(w, new, rate, correction, decay), *new]

            self._programs[decay] = tf.function(run, jit_compile=True, autograph=False)
        return self._programs[decay]


def pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of each part of a tensor that is updated at once."""
    rows, *rest = tensor.shape_in(Scheme.KERAS)
    step = max(1, PIECE // math.prod(rest))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _padded(values: np.ndarray) -> np.ndarray:
    """Flat, of one of the few sizes that programs are compiled for."""
    size = max(_LEAST, 2 ** math.ceil(math.log2(values.size)))
    if size == values.size:
        return values.reshape(-1)
    flat = np.zeros(size, np.float32)
    flat[: values.size] = values.reshape(-1)
    return flat


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo("float32", tensor.shape_in(Scheme.TF))
