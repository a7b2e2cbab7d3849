"""An adapter that is in memory, on a model that is on the disk and only read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from gptj_convert.streams.strips import Strip
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.lora import Lora
from gptj_model.network.weights import first_a
from gptj_model.source import TensorSource, read_rows, read_tensor
from gptj_model.streaming.prefetch import blocks_ahead
from gptj_model.streaming.training import Draw, ReadHead, StreamedTraining
from gptj_model.tensors import Scheme, Tensor, block, table
from gptj_model.vocabulary import read_head
from runner.config.params import Params
from runner.config.trainable import trainable_rows
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator
from runner.training.executor import StepResult
from runner.training.initialize import initialization_seed
from runner.training.lazy_array import LazyArray
from runner.training.lora import Adapter, base_name
from runner.training.run import checkpoints
from runner.training.streamed.embedding_gradient import TokenRows
from runner.training.streamed.scratch import Scratch
from runner.training.streamed.step import StreamedStep, states_bytes
from runner.training.update.optimizer import Optimizer


class StreamedAdapterExecutor:
    """See `Executor`. The model is read as it is stored, in 16 bits too; nothing of it is written
    but into checkpoints.

    Args:
        config: of the model.
        params: of the run, with `model.lora`.
        model_dir: the run's folder; its disk also holds what a step keeps.

    Raises:
        ConfigError: see `trainable_rows`.
    """

    saves_every_step = False
    devices = 1
    placement = None

    def __init__(self, config: GPTJConfig, params: Params, model_dir: Path) -> None:
        assert params.model.lora, "all weights are trained by another executor"
        self._config = config
        self._params = params
        self._model_dir = model_dir
        self._lora = params.model.lora.lora
        self.trained = trainable_rows(config, params)
        self._variables = _first_values(self._lora, config, initialization_seed(params))
        self._optimizer = Optimizer(params.optimizer, {t: self._variables[t] for t in self.trained})
        self._apply = tf.function(self._optimizer.apply, jit_compile=True, autograph=False)
        self._scratch: Scratch | None = None

    def load(self, source: TensorSource, scheme: Scheme) -> None:
        """See `Executor`; the source is read as long as the run goes on."""
        self._model = _FrozenModel(self._config, source, scheme, self._lora, self._variables)
        self._passes = StreamedTraining(
            self._config,
            dtype=self._params.dtype_policy,
            accumulate=self._params.optimizer.grad_accum_steps,
            lora=self._lora,
            head_rows=self._model.head_rows,
        )
        kernels = {t: self._model.stored(t) for t in self._lora.rows(self._config)}
        self._adapter = Adapter(self._lora, kernels, self._variables)

    def initialize(self) -> None:
        """See `Executor`.

        Raises:
            ConfigError: always: what is adapted must be on the disk.
        """
        raise ConfigError(
            "model.lora with runconfig.execution streaming adapts a checkpoint, and none is named",
            hint="name one with --init-from",
        )

    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        """See `Executor`."""
        self._adapter.begin(values)

    def load_state(self, source: TensorSource, step: int) -> str | None:
        """See `Executor`."""
        if not self._adapter.load(source):
            return "no such adapter: it begins anew"
        self._model.adapted_from_base = True
        if not self._optimizer.load(source, step):
            return f"no slots of {self._params.optimizer.optimizer_type}: they begin anew"
        return None

    def step(self, group: Sequence[Batch], draw: Draw, scale: float, rate: float) -> StepResult:
        """See `Executor`."""
        batches = [tuple(map(np.asarray, batch)) for batch in group]
        if self._scratch is None:
            self._scratch = Scratch(self._model_dir, list(states_bytes(self._config, batches)))
        found = _Gradients()
        step = StreamedStep(
            self._config, self._passes, self._model, self._scratch, found, self.trained
        )
        loss = step.run(batches, draw, scale)
        gradients = [tf.convert_to_tensor(found.by_row[t]) for t in self.trained]
        norm = self._apply(gradients, *self._optimizer.arguments(rate))
        return StepResult(loss, float(norm))

    def advance(self) -> None:
        """See `Executor`."""
        self._optimizer.advance()

    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        """See `Executor`."""
        tensors: dict[str, Any] = {t.tf: self._model.stored(t) for t in table(self._config)}
        tensors |= self._optimizer.slots | self._optimizer.scalars() | self._adapter.tensors()
        keep = self._params.runconfig.keep_checkpoint_max or 0
        return checkpoints.save(self._model_dir, step, tensors | dict(state), keep=keep)

    def evaluator(self) -> Evaluator:
        """See `Executor`.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "train_and_eval does not evaluate an adapter of a streamed model",
            hint="`gptj eval` evaluates its checkpoints",
        )

    def weights(self) -> Mapping[str, Any]:
        """See `Executor`."""
        return {row.hf: variable for row, variable in self._variables.items()}

    def close(self) -> None:
        """See `Executor`."""
        if self._scratch:
            self._scratch.close()


class _FrozenModel:
    """See `BlockWeights`: a checkpoint of any format, and the adapter's present values."""

    def __init__(
        self,
        config: GPTJConfig,
        source: TensorSource,
        scheme: Scheme,
        lora: Lora,
        variables: Mapping[Tensor, Any],
    ) -> None:
        self._config = config
        self._source = source
        self._scheme = scheme
        self._variables = variables
        self._adapters = lora.rows(config)
        self.head_rows = config.tie_word_embeddings or not scheme.transposes
        """Whether parts of the head have a row a token."""
        self.adapted_from_base = False
        """Whether the source holds merged kernels, and beside them those that are adapted."""

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `BlockWeights`."""
        values = read_rows(self._source, tensor.name(self._scheme), start, stop)
        return values.astype(np.float32, copy=False)

    def head(self) -> ReadHead:
        """See `BlockWeights`; parts are read as they are stored."""

        def part(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            weight_VD, bias_V = read_head(self._config, self._source, self._scheme, start, stop)
            return weight_VD if self.head_rows else weight_VD.T, bias_V

        return part

    def blocks(
        self, order: Iterable[int], load: Callable[[Sequence[np.ndarray]], None]
    ) -> Iterator[int]:
        """See `BlockWeights`."""
        return blocks_ahead(self._block, order, load)

    def of_block(self, i: int) -> Sequence[Tensor]:
        """See `BlockWeights`."""
        return [row for k, pair in self._adapters.items() if k.block == i for row in pair]

    def whole(self, tensor: Tensor) -> np.ndarray:
        """A weight in Keras' layout: as stored, or in float32 if it had to be transposed."""
        name, op = tensor.name(self._scheme), tensor.op(self._scheme, Scheme.KERAS)
        if self.adapted_from_base and tensor in self._adapters:
            name = base_name(tensor)
        values = read_tensor(self._source, name)
        if (laid_out := op(values)).flags.c_contiguous:
            return laid_out
        out = np.empty(values.size, np.float32)
        Strip(values, op).fill(out, 0)
        return out.reshape(tensor.shape_in(Scheme.KERAS))

    def stored(self, tensor: Tensor) -> LazyArray:
        """A weight in float32, read when it is asked for."""
        return LazyArray(
            tensor.shape_in(Scheme.TF),
            lambda: self.whole(tensor).astype(np.float32, copy=False),
        )

    def _block(self, i: int) -> list[np.ndarray]:
        adapters = [self._variables[row].numpy() for row in self.of_block(i)]
        return [*(self.whole(t) for t in block(self._config, i)), *adapters]


class _Gradients:
    """See `Update`: those of an adapter are small enough to be there together."""

    def __init__(self) -> None:
        self.by_row: dict[Tensor, np.ndarray] = {}

    def room(self, tensors: Sequence[Tensor]) -> list[np.ndarray]:
        """See `Update`."""
        return [np.empty(t.shape_in(Scheme.KERAS), np.float32) for t in tensors]

    def take(self, gradients: Mapping[Tensor, np.ndarray], *, last: bool) -> None:
        """See `Update`."""
        self.by_row |= gradients

    def take_embedding(self, tensor: Tensor, rows: TokenRows) -> None:
        """See `Update`; no adapter is of the embedding."""


def _first_values(lora: Lora, config: GPTJConfig, seed: int) -> dict[Tensor, tf.Variable]:
    """A random, B 0, as those of a resident model begin."""
    found = {}
    for n, (a, b) in enumerate(lora.rows(config).values()):
        first = first_a(seed, n)(a.shape_in(Scheme.KERAS))
        found[a] = tf.Variable(tf.convert_to_tensor(first))
        found[b] = tf.Variable(tf.zeros(b.shape_in(Scheme.KERAS)))
    return found
