"""A model that is brought from the disk one block at a time, trained, and updated where it is.

Forwards, each block's input is kept; backwards, each block is computed once more. What a step
needs of memory is one block with its gradients, whatever their number.

Shape suffixes: B batch, T time, N tokens, U different tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.formats.bundle import BundleSource
from gptj_model.config import GPTJConfig
from gptj_model.source import TensorSource, read_tensor
from gptj_model.streamed_training import Draw, StreamedTraining
from gptj_model.streaming import StreamedModel
from gptj_model.tensors import Scheme, Tensor, block, embedding, head, table
from runner import checkpoints
from runner.data.input_fn import Batch
from runner.disk_state import DiskState, Rows, pieces
from runner.evaluate import Evaluator, StreamedEvaluator
from runner.executor import StepResult
from runner.initialize import first_values
from runner.params import Params
from runner.scratch import Scratch
from runner.trained import trained_rows
from runner.update_rule import BetaPowers, UpdateRule

#: Elements whose squares are summed in float32 before they are in float64.
_SUMMED = 2**16


class StreamedExecutor:
    """See `Executor`. Its state is a checkpoint, and every step ends with one.

    Args:
        config: of the model.
        params: of the run.
        model_dir: the run's folder; its disk also holds what a step keeps.

    Raises:
        ConfigError: see `trained_rows`.
    """

    saves_every_step = True
    devices = 1
    placement = None

    def __init__(self, config: GPTJConfig, params: Params, model_dir: Path) -> None:
        self._config = config
        self._params = params
        self._model_dir = model_dir
        self.trained = trained_rows(config, params)
        self._rule = UpdateRule(params.optimizer)
        self._powers = BetaPowers(params.optimizer)
        self._state = DiskState(config, self._rule, self.trained, model_dir)
        self._passes = StreamedTraining(
            config, dtype=params.dtype_policy, accumulate=params.optimizer.grad_accum_steps
        )
        self._scratch: Scratch | None = None
        self._worker = ThreadPoolExecutor(1, "update")

    def load(self, source: TensorSource, scheme: Scheme) -> None:
        """See `Executor`; float32 weights of a bundle are read where they are."""
        rows = table(self._config)
        if scheme is Scheme.TF and isinstance(source, BundleSource):
            if all(source.tensors[t.tf].dtype == "float32" for t in rows):
                self._state.open(source.prefix)
                return
        self._state.begin(
            (t, t.op(scheme, Scheme.TF)(read_tensor(source, t.name(scheme)))) for t in rows
        )

    def initialize(self) -> None:
        """See `Executor`."""
        self._state.begin(first_values(self._config, self._params))

    def load_state(self, source: TensorSource, step: int) -> str | None:
        """See `Executor`."""
        if not self._state.take_slots():
            return f"no slots of {self._params.optimizer.optimizer_type}: they begin anew"
        self._powers.load(source, step)
        return None

    def step(self, group: Sequence[Batch], draw: Draw, scale: float, rate: float) -> StepResult:
        """See `Executor`."""
        if self._scratch is None:
            self._scratch = Scratch(self._model_dir)
        update = _Update(self._state, self._rule, self._scratch, self._worker)
        update.arguments = rate, self._powers.correction
        try:
            step = _Step(self._config, self._passes, self._state, self._scratch, update)
            loss = step.run([tuple(map(np.asarray, b)) for b in group], draw, scale)
            norm = update.finish()
        except BaseException:
            update.wait()
            self._state.discard()
            raise
        return StepResult(loss, norm)

    def advance(self) -> None:
        """See `Executor`."""
        self._powers.advance()

    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        """See `Executor`."""
        keep = self._params.runconfig.keep_checkpoint_max or 0
        self._state.commit(step, {**state, **self._powers.scalars()}, stays=stays, keep=keep)
        return checkpoints.prefix(self._model_dir, step)

    def evaluator(self) -> Evaluator:
        """See `Executor`."""
        return StreamedEvaluator(lambda: StreamedModel(self._config, self._state.source, Scheme.TF))

    def weights(self) -> Mapping[str, Any]:
        """See `Executor`."""
        return {t.hf: _OnDisk(self._state, t) for t in table(self._config)}

    def close(self) -> None:
        """See `Executor`."""
        self._worker.shutdown()
        self._state.discard()
        self._state.close()
        if self._scratch:
            self._scratch.close()


class _OnDisk:
    """A weight that is read when it becomes an array, and not kept."""

    def __init__(self, state: DiskState, tensor: Tensor) -> None:
        self._read = partial(state.rows, tensor)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read()


class _Step:
    """The passes of one step over all its batches, which share each block that is brought."""

    def __init__(
        self,
        config: GPTJConfig,
        passes: StreamedTraining,
        state: DiskState,
        scratch: Scratch,
        update: _Update,
    ) -> None:
        self._config = config
        self._passes = passes
        self._state = state
        self._scratch = scratch
        self._update = update

    def run(self, batches: Sequence[tuple], draw: Draw, scale: float) -> float:
        """Every gradient goes to the update; returns the mean of the batches' losses.

        Args:
            batches: ids, 1 on tokens that do not count, and labels; each (B, T).
            draw: see `Executor.step`.
            scale: of the loss.
        """
        self._forward(batches, draw)
        loss, head_gradients = self._head(batches, scale)
        self._backward(batches, draw, scale)
        self._embedding(batches, draw, scale, head_gradients)
        return loss

    # The hidden states of batch n before block i are kept as (n, i). Once the block's gradients
    # are known, the gradient of these states is kept in their place.

    def _forward(self, batches: Sequence[tuple], draw: Draw) -> None:
        weight = embedding(self._config)
        for n, (ids_BT, _, _) in enumerate(batches):
            unique, where = np.unique(ids_BT, return_inverse=True)
            rows = np.concatenate([self._state.rows(weight, int(i), int(i) + 1) for i in unique])
            x_BTD = self._passes.embed(rows[where.reshape(ids_BT.shape)], n, draw)
            self._keep(n, 0, x_BTD)
        for i in self._state.blocks(range(self._config.n_layer), self._passes.load):
            for n in range(len(batches)):
                x_BTD = self._passes.forward(self._scratch.get((n, i)), i, n, draw)
                self._keep(n, i + 1, x_BTD)

    def _head(self, batches: Sequence[tuple], scale: float) -> tuple[float, Rows | None]:
        """The mean loss; and of a tied head the gradient that waits for the embedding's."""
        config, rows = self._config, head(self._config)
        if config.tie_word_embeddings:
            rows.insert(2, embedding(config))
        weights = [self._state.rows(t) for t in rows]
        losses, total = [], _Total()
        for n, (_, ignored_BT, labels_BT) in enumerate(batches):
            x_BTD = self._scratch.get((n, config.n_layer))
            found = self._passes.head(x_BTD, weights, labels_BT, ignored_BT, scale)
            losses.append(found.loss)
            total.add(found.gradients)
            self._keep(n, config.n_layer, found.d_x_BTD)
        del weights
        gradients = dict(zip(rows, total.take(), strict=True))
        waiting = gradients.pop(embedding(config), None)
        self._update.take(gradients)
        if waiting is None:
            return math.fsum(losses) / len(losses), None
        self._update.wait()
        return math.fsum(losses) / len(losses), self._update.keep(embedding(config), waiting)

    def _backward(self, batches: Sequence[tuple], draw: Draw, scale: float) -> None:
        last = self._config.n_layer - 1
        for i in self._state.blocks(range(last, -1, -1), self._passes.load):
            total = _Total()
            for n in range(len(batches)):
                x_BTD, d_out_BTD = self._scratch.get((n, i)), self._scratch.get((n, i + 1))
                d_x_BTD, gradients = self._passes.backward(x_BTD, d_out_BTD, i, n, draw, scale)
                total.add(gradients)
                self._keep(n, i, d_x_BTD)
                del gradients
            self._update.take(dict(zip(block(self._config, i), total.take(), strict=True)))

    def _embedding(
        self, batches: Sequence[tuple], draw: Draw, scale: float, of_head: Rows | None
    ) -> None:
        weight = embedding(self._config)
        d_rows_ND = [
            self._passes.embed_backward(self._scratch.get((n, 0)), n, draw, scale).reshape(
                -1, self._config.n_embd
            )
            for n in range(len(batches))
        ]
        ids_N = np.concatenate([ids_BT.reshape(-1) for ids_BT, _, _ in batches])
        rows = _token_rows(ids_N, np.concatenate(d_rows_ND))
        if of_head is not None:
            self._update.take_rows(weight, lambda a, b: of_head(a, b) + rows(a, b))
        else:
            self._update.take_rows(weight, rows)

    def _keep(self, n: int, i: int, x_BTD: Any) -> None:
        self._scratch.put((n, i), np.asarray(x_BTD))


class _Total:
    """Gradients of several batches, summed in place."""

    def __init__(self) -> None:
        self._sums: list[np.ndarray] = []
        self._own = False

    def add(self, gradients: list[np.ndarray]) -> None:
        """Add those of one more batch."""
        if not self._sums:
            self._sums = gradients
            return
        if not self._own:  # the first are TensorFlow's memory
            self._sums = [g.copy() for g in self._sums]
            self._own = True
        for total, gradient in zip(self._sums, gradients, strict=True):
            total += gradient

    def take(self) -> list[np.ndarray]:
        """The sums, which are not kept."""
        sums, self._sums = self._sums, []
        return sums


def _token_rows(ids_N: np.ndarray, d_ND: np.ndarray) -> Rows:
    """The gradient of the embedding from those of the rows that were looked up."""
    unique_U, where_N = np.unique(ids_N, return_inverse=True)
    sums_UD = np.zeros((len(unique_U), d_ND.shape[1]), np.float32)
    np.add.at(sums_UD, where_N.reshape(-1), d_ND)

    def rows(start: int, stop: int) -> np.ndarray:
        found = np.zeros((stop - start, d_ND.shape[1]), np.float32)
        first, last = np.searchsorted(unique_U, (start, stop))
        found[unique_U[first:last] - start] = sums_UD[first:last]
        return found

    return rows


class _Update:
    """Gradients on their way into the next state, in a thread of their own.

    Without clipping by norm they go there at once, and the norm is known when it is written; with
    it they are kept on the disk until the norm is known.
    """

    def __init__(
        self, state: DiskState, rule: UpdateRule, scratch: Scratch, worker: ThreadPoolExecutor
    ) -> None:
        self._state = state
        self._rule = rule
        self._scratch = scratch
        self._worker = worker
        self._kept: dict[Tensor, Rows] = {}
        self._written: set[Tensor] = set()
        self._squares = 0.0
        self._running: Future[None] | None = None
        self.arguments: tuple[float, Any] = (0.0, 1.0)
        """Learning rate and bias correction."""

    def take(self, gradients: dict[Tensor, np.ndarray]) -> None:
        """Take gradients of whole tensors; the ones before are done with by then."""
        self._submit({t: _of(g) for t, g in gradients.items()}, in_memory=True)

    def take_rows(self, tensor: Tensor, rows: Rows) -> None:
        """Take a gradient that is made when it is asked for."""
        self._submit({tensor: rows}, in_memory=False)

    def keep(self, tensor: Tensor, gradient: np.ndarray) -> Rows:
        """Put a gradient on the disk."""
        self._scratch.put(tensor.tf, gradient)
        return partial(self._scratch.get, tensor.tf)

    def wait(self) -> None:
        """Return once what was taken is done with."""
        running, self._running = self._running, None
        if running:
            running.result()

    def finish(self) -> float:
        """Write what is missing of the next state, if the norm is finite; returns the norm."""
        self.wait()
        with np.errstate(over="ignore"):
            norm = float(np.sqrt(np.float32(self._squares)))
        if not math.isfinite(norm):
            self._state.discard()
            return norm
        rows = [t for t in self._state.tensors if t not in self._written]
        self._state.update(((t, self._kept.get(t)) for t in rows), norm, *self.arguments)
        return norm

    def _submit(self, gradients: dict[Tensor, Rows], *, in_memory: bool) -> None:
        self.wait()
        self._running = self._worker.submit(self._run, gradients, in_memory)

    def _run(self, gradients: dict[Tensor, Rows], in_memory: bool) -> None:
        trained = {t: g for t, g in gradients.items() if t in self._state.trained}
        for tensor, rows in trained.items():
            for start, stop in pieces(tensor):
                self._squares += _squares(rows(start, stop))
        if not self._rule.clips_by_norm:
            self._state.update(trained.items(), 0.0, *self.arguments)
            self._written |= trained.keys()
            return
        for tensor, rows in trained.items():
            size = tensor.shape_in(Scheme.KERAS)[0]
            self._kept[tensor] = self.keep(tensor, rows(0, size)) if in_memory else rows


def _of(array: np.ndarray) -> Rows:
    return lambda start, stop: array[start:stop]


def _squares(values: np.ndarray) -> float:
    """The sum of their squares; infinite or not a number if one of them is."""
    flat = values.reshape(-1)
    parts = (flat[n : n + _SUMMED] for n in range(0, flat.size, _SUMMED))
    return math.fsum(float(np.vdot(part, part)) for part in parts)
