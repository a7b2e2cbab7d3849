"""Weights and slots of a run on disk, read by ranges and rewritten each step.

The state of a step is an ordinary checkpoint. The next one is written beside it while it is read,
and replaces it once all of it is durable: as everything changes in a step, this writes no more than
an update in place, and a complete state exists at every instant. Its weights can be read earlier,
each as soon as it is written, so the next step starts while this update continues.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_convert.streams.pipeline import BufferPool, Pipeline
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.errors import TrainingFault
from gptj_model.page_buffers import page_buffers
from gptj_model.source import TensorInfo, TensorSource, raw_bytes, read_rows
from gptj_model.streaming.block_buffers import BlockBuffers
from gptj_model.streaming.prefetch import prefetch_blocks
from gptj_model.streaming.training import Draw, ReadHead
from gptj_model.tensors import (
    EMBEDDING,
    HEAD_BIAS,
    HEAD_WEIGHT,
    Scheme,
    Tensor,
    block,
    embedding,
    head,
    table,
)
from runner.training.run import checkpoints
from runner.training.update.rule import UpdateRule
from runner.training.update.stochastic_rounding import random_bits, round_into, widened

#: Number of elements read and written at once: 8 MiB each of weight, gradient and slots.
PIECE = 2**21
#: Number of those elements that are updated at once, so that intermediate values fit in a cache.
_UPDATED = 2**16
#: Dtypes that slots may be stored in.
_SLOTS = ("float32", "bfloat16")
#: Bits that are all zero only in zeros and denormal numbers.
_EXPONENT = np.uint32(0x7F800000)
#: Number of pieces in use: one each is read, updated and written.
_SLABS = 3

Gradient = Callable[[int, np.ndarray], None]
"""Fills a flat float32 array with consecutive elements of a gradient in Keras' layout, from an
element on."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive elements of one tensor that are updated at once."""

    tensor: Tensor
    start: int
    """Index of its first element."""
    memory: np.ndarray
    """Arrays of the piece: a lane each for weight, slots and gradient. Values read in 16 bits take
    the second half of a lane, and values written in 16 bits the first, so that nothing is
    overwritten before it is used."""
    old: list[np.ndarray]
    """Weight and slots as they are stored."""
    new: list[np.ndarray]
    """Weight and slots as they will be stored."""
    gradient: np.ndarray | None
    names: list[str]
    """Names of weight and slots."""


class StreamedState:
    """The current state, and the draft of the next one, which a thread may be writing.

    Args:
        config: configuration of the model.
        rule: rule of the update.
        trained: rows that are updated; the others are copied.
        model_dir: folder that states are written to.
        slots_dtype: dtype that slots are written in: "float32", or "bfloat16", rounded
            stochastically.
    """

    def __init__(
        self,
        config: GPTJConfig,
        rule: UpdateRule,
        trained: Sequence[Tensor],
        model_dir: Path,
        *,
        slots_dtype: str,
    ) -> None:
        self._config = config
        self._rule = rule
        self._slots_dtype = slots_dtype
        self._numbers = {t: n for n, t in enumerate(table(config))}
        self._slots = {t: rule.slots(t) for t in trained}
        vocabulary = [t for t in head(config) if t.hf in (HEAD_WEIGHT.hf, HEAD_BIAS.hf)]
        tied = [embedding(config)] if config.tie_word_embeddings else []
        self._head_rows = (*tied, *vocabulary)
        self._model_dir = model_dir
        self._weights = {t.tf: _info(t) for t in table(config)}
        self.memory = BlockBuffers(config, Scheme.TF, self._weights)
        """Buffers that its blocks are read into."""
        self._source: TensorSource | None = None
        self._has_slots = False
        self._draft: checkpoints.Draft | None = None
        self._origin: TensorSource | None = None  # the state that the draft is made from
        self._superseded: int | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Every weight."""
        return table(self._config)

    @property
    def trained(self) -> Container[Tensor]:
        """Rows that are updated."""
        return self._slots.keys()

    @property
    def source(self) -> TensorSource:
        """Tensors of the current state; reading one that is still being written waits for it."""
        assert self._source, "a state was opened"
        return self._source

    def open(self, prefix: Path, *, has_slots: bool = False) -> None:
        """Read from this bundle from now on: float32, with names and layout of TF."""
        self.close()
        self._source = BundleSource(prefix)
        self._has_slots = has_slots

    def take_slots(self) -> bool:
        """Use the slots of the open bundle; return False if it lacks some.

        Raises:
            TrainingFault: the slots are neither float32 nor bfloat16.
        """
        known = self.source.tensors
        names = [name for slots in self._slots.values() for name in slots]
        self._has_slots = all(name in known for name in names)
        for name in names if self._has_slots else ():
            if known[name].dtype not in _SLOTS:
                raise TrainingFault(
                    f"the checkpoint's {name!r} holds {known[name].dtype}, expected "
                    f"{' or '.join(_SLOTS)}",
                    hint="to start from the weights alone, name it with --checkpoint-path",
                )
        return self._has_slots

    def begin(self, weights: Iterable[tuple[Tensor, Any]]) -> None:
        """Write a first state of step 0 without slots, and open it.

        Args:
            weights: values of every tensor, in TF's layout.
        """
        with closing(checkpoints.Draft(self._model_dir, self._weights)) as draft:
            for tensor, values in weights:
                draft.append(tensor.tf, np.asarray(values).astype(np.float32, copy=False))
            self.open(draft.publish(0))
        checkpoints.retain(self._model_dir, keep=0)
        self._superseded = 0

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Implement `BlockWeights`, for any weight."""
        return read_rows(self.source, tensor.tf, start, stop)

    def head(self) -> ReadHead:
        """Implement `BlockWeights`; the head is read once for logits and gradients."""
        weight, bias = self._head_rows
        (memory,) = page_buffers(1, 4 * weight.size)
        values = memory.view(np.float32).reshape(weight.shape_in(Scheme.TF))
        self.source.read_into(weight.tf, 0, raw_bytes(values))
        bias_V = self.rows(bias)

        def part(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            rows = slice(start, stop)
            return values[rows if weight.hf == EMBEDDING.hf else (slice(None), rows)], bias_V[rows]

        return part

    def blocks(
        self, order: Iterable[int], load: Callable[[Sequence[np.ndarray]], None]
    ) -> Iterator[int]:
        """Implement `BlockWeights`."""
        return prefetch_blocks(partial(self.memory.read, self.source), order, load)

    def of_block(self, i: int) -> Sequence[Tensor]:
        """Implement `BlockWeights`."""
        return block(self._config, i)

    def update(
        self,
        work: Iterable[tuple[Tensor, Gradient | None]],
        norm: float,
        rate: float,
        correction: Any,
        draw: Draw,
    ) -> None:
        """Write tensors and their slots into the draft of the next state.

        Args:
            work: each tensor with its gradient; None copies it.
            norm: norm of all gradients, if the rule clips by it.
            rate: learning rate.
            correction: factor from `BetaPowers`.
            draw: what the stochastic rounding is a function of.
        """
        scalars = [np.float32(x) for x in (norm, rate, correction)]
        draft = self._begun()
        with draft.kept_whole(), Pipeline() as pipeline:
            parts = 2 + max((len(names) for names in self._slots.values()), default=0)
            buffers = BufferPool(pipeline, _SLABS, parts * PIECE * 4)
            read = pipeline.prefetch(self._read(work, buffers), depth=1)
            new = pipeline.prefetch(
                (self._updated(piece, scalars, draw) for piece in read), depth=1
            )
            for piece in new:
                for name, part in zip(piece.names, piece.new, strict=True):
                    draft.append(name, part)
                buffers.give(piece.memory)

    def advance(self) -> None:
        """Make the draft the current state, although an update may still be writing it."""
        self._source = self._begun()

    def discard(self) -> None:
        """Cancel the update, and keep the state that it started from."""
        if self._draft:
            self._draft.close()
            self._source = self._origin
        self._draft = self._origin = None

    def commit(self, step: int, scalars: Mapping[str, np.ndarray], *, stays: bool, keep: int):
        """Make the current state durable, unless it is already; it may be kept.

        Args:
            step: step of the state.
            scalars: further tensors of the checkpoint.
            stays: whether it is kept after the next one.
            keep: number of checkpoints to keep.
        """
        if self._draft:
            self._draft.publish(step, scalars)
            self._has_slots = True
            if self._origin:
                self._origin.close()
            self._draft = self._origin = None
            checkpoints.retain(self._model_dir, keep=keep, superseded=self._superseded)
        self._superseded = None if stays else step

    def close(self) -> None:
        """Close the files; closing twice is harmless."""
        if self._source:
            self._source.close()
        self._source = None

    def _begun(self) -> checkpoints.Draft:
        """Return the draft of the next state."""
        if self._draft is None:
            slots = {
                name: _info(t, self._slots_dtype)
                for t, names in self._slots.items()
                for name in names
            }
            self._draft = checkpoints.Draft(self._model_dir, self._weights | slots)
            self._origin = self._source
        return self._draft

    def _read(
        self, work: Iterable[tuple[Tensor, Gradient | None]], buffers: BufferPool
    ) -> Iterator[_Piece]:
        origin = self._origin
        assert origin, "a draft was begun"
        for tensor, gradient in work:
            slots = self._slots.get(tensor, {}) if gradient else {}
            names = [tensor.tf, *slots]
            for start, size in pieces(tensor):
                memory = buffers.take()
                lanes = memory.reshape(-1, 4 * PIECE)
                old, new, of_weight = [], [], None
                for name, lane in zip(names, lanes, strict=False):
                    stored = name == tensor.tf or self._has_slots
                    dtype = NUMPY[origin.tensors[name].dtype if stored else "float32"]
                    half = 2 * PIECE if dtype.itemsize == 2 else 0
                    old.append(lane[half:].view(dtype)[:size])
                    if stored:
                        origin.read_into(name, dtype.itemsize * start, raw_bytes(old[-1]))
                    else:
                        old[-1][:] = slots[name]
                    written = "float32" if name == tensor.tf else self._slots_dtype
                    new.append(lane.view(NUMPY[written])[:size])
                if gradient:
                    of_weight = lanes[len(names)].view(np.float32)[:size]
                    gradient(start, of_weight)
                yield _Piece(tensor, start, memory, old, new, of_weight, names)

    def _updated(self, piece: _Piece, scalars: Sequence[np.float32], draw: Draw) -> _Piece:
        """Return the piece with its new weight and slots."""
        if piece.gradient is None:
            return piece
        with np.errstate(all="ignore"):  # if the norm is not finite, the result is discarded
            for start in range(0, piece.gradient.size, _UPDATED):
                self._update(piece, slice(start, start + _UPDATED), scalars, draw)
        return piece

    def _update(
        self, piece: _Piece, part: slice, scalars: Sequence[np.float32], draw: Draw
    ) -> None:
        """Update some elements of a piece."""
        assert piece.gradient is not None
        weight, *slots = (
            values[part] if values.itemsize == 4 else widened(values[part]) for values in piece.old
        )
        norm, rate, correction = scalars
        gradient = self._rule.clipped(piece.gradient[part], norm)
        if not slots:
            (piece.new[0][part],) = self._rule.take(gradient, [weight], rate)
            return
        found = self._rule.take(gradient, slots, rate)
        decay = self._rule.decay(piece.tensor)
        piece.new[0][part] = self._rule.move(weight, found, rate, correction, decay)
        for n, (new, values) in enumerate(zip(piece.new[1:], found, strict=True)):
            _flush(values)
            if new.itemsize == 4:
                new[part] = values
            else:
                of = n, self._numbers[piece.tensor]
                bits = random_bits(draw, of, piece.start + part.start, values.size)
                round_into(new[part], values, bits)


def _flush(values: np.ndarray) -> None:
    """Replace denormal numbers by zeros, as TensorFlow does: those of a vanishing moment would slow
    down every later step."""
    exponents = values.view(np.uint32) & _EXPONENT
    if not exponents.min():
        values[exponents == 0] = 0


def pieces(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield start and size of each part of a tensor that is updated at once."""
    for start in range(0, tensor.size, PIECE):
        yield start, min(PIECE, tensor.size - start)


def _info(tensor: Tensor, dtype: str = "float32") -> TensorInfo:
    return TensorInfo(dtype, tensor.shape_in(Scheme.TF))
