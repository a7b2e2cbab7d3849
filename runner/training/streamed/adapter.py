"""Training of an adapter in memory, on a model that stays on disk and is only read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from typing_extensions import override

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_convert.streams.strips import Strip
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.lora import Lora
from gptj_model.network.weights import first_a
from gptj_model.source import TensorSource, read_rows, read_tensor
from gptj_model.streaming.forward import StreamedModel
from gptj_model.streaming.prefetch import prefetch_blocks
from gptj_model.streaming.training import Draw, ReadHead, StreamedTraining
from gptj_model.tensors import Scheme, Tensor, block, table
from gptj_model.vocabulary import read_head
from runner.config.params import Params
from runner.config.trainable import trainable_rows
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator, StreamedEvaluator
from runner.evaluation.reuse import Borrowed
from runner.training.executors.executor import Executor, StepResult
from runner.training.run import checkpoints
from runner.training.streamed.embedding_gradient import EmbeddingGradient
from runner.training.streamed.passes import borrow_passes
from runner.training.streamed.scratch import Scratch
from runner.training.streamed.step import StreamedStep, states_bytes
from runner.training.update.optimizer import Optimizer
from runner.training.weights.initialize import initialization_seed
from runner.training.weights.lazy_array import LazyArray
from runner.training.weights.lora import Adapter, base_name


class StreamedAdapterExecutor(Executor):
    """Executor of an adapter whose base model is streamed. The model is read as it is stored, in 16
    bits too, and written only into checkpoints.

    Args:
        config: configuration of the model.
        params: parameters of the run, with `model.lora`.
        model_dir: folder of the run; its disk also holds the scratch file of a step.

    Raises:
        ConfigError: as `trainable_rows` raises it.
    """

    def __init__(self, config: GPTJConfig, params: Params, model_dir: Path) -> None:
        assert params.model.lora, "all weights are trained by another executor"
        self._config = config
        self._params = params
        self._model_dir = model_dir
        self._lora = params.model.lora.lora
        self._evaluated = ExitStack()
        self.trained = trainable_rows(config, params)
        self._variables = _first_values(self._lora, config, initialization_seed(params))
        self._optimizer = Optimizer(params.optimizer, {t: self._variables[t] for t in self.trained})
        self._apply = tf.function(self._optimizer.apply, jit_compile=True, autograph=False)
        self._passes: Borrowed[StreamedTraining] | None = None
        self._scratch: Scratch | None = None

    @override
    def load(self, source: TensorSource, scheme: Scheme) -> None:
        """Open the weights of a checkpoint, which are read for as long as the run trains."""
        self._model = _FrozenModel(self._config, source, scheme, self._lora, self._variables)
        self._passes = borrow_passes(self._config, self._params, head_rows=self._model.head_rows)
        kernels = {t: self._model.stored(t) for t in self._lora.rows(self._config)}
        self._adapter = Adapter(self._lora, kernels, self._variables)

    @override
    def initialize(self) -> None:
        """Refuse random weights.

        Raises:
            ConfigError: always, because the adapted model must be on disk.
        """
        raise ConfigError(
            "model.lora with runconfig.execution streaming adapts a checkpoint, and none is named",
            hint="name one with --init-from",
        )

    @override
    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        self._adapter.begin(values)

    @override
    def load_state(self, source: TensorSource, step: int) -> str | None:
        if not self._adapter.load(source):
            return "no such adapter: training starts with a new one"
        self._model.adapted_from_base = True
        if not self._optimizer.load(source, step):
            return f"no slots of {self._params.optimizer.optimizer_type}: they start from zero"
        return None

    @override
    def step(self, group: Sequence[Batch], draw: Draw, scale: float, rate: float) -> StepResult:
        batches = [tuple(map(np.asarray, batch)) for batch in group]
        if self._scratch is None:
            self._scratch = Scratch(self._model_dir, list(states_bytes(self._config, batches)))
        found = _Gradients()
        assert self._passes, "loaded"
        step = StreamedStep(
            self._config, self._passes.model, self._model, self._scratch, found, self.trained
        )
        loss = step.run(batches, draw, scale)
        gradients = [tf.convert_to_tensor(found.by_row[t]) for t in self.trained]
        norm = self._apply(gradients, *self._optimizer.arguments(rate))
        return StepResult(loss, float(norm))

    @override
    def advance(self) -> None:
        self._optimizer.advance()

    @override
    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        tensors: dict[str, Any] = {t.tf: self._model.stored(t) for t in table(self._config)}
        tensors |= self._optimizer.slots | self._optimizer.scalars() | self._adapter.tensors()
        keep = self._params.runconfig.keep_checkpoint_max or 0
        return checkpoints.save(self._model_dir, step, tensors | dict(state), keep=keep)

    @override
    def evaluator(self) -> Evaluator:
        # An evaluation follows a save, and a checkpoint has the adapter merged.
        return StreamedEvaluator(self._saved_model)

    def _saved_model(self) -> StreamedModel:
        self._evaluated.close()  # the source of the evaluation before
        step = checkpoints.steps(self._model_dir)[-1]
        source = BundleSource(checkpoints.prefix(self._model_dir, step))
        self._evaluated.enter_context(closing(source))
        return StreamedModel(self._config, source, Scheme.TF)

    @override
    def weights(self) -> Mapping[str, Any]:
        return {row.hf: variable for row, variable in self._variables.items()}

    @override
    def close(self) -> None:
        self._evaluated.close()
        if self._scratch:
            self._scratch.close()
        if self._passes:
            self._passes.give_back()


class _FrozenModel:
    """`BlockWeights` of a checkpoint of any format, with the current values of the adapter."""

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
        """Whether parts of the head have one row per token."""
        self.adapted_from_base = False
        """Whether the source holds merged kernels, and beside them their bases."""

    def rows(self, tensor: Tensor, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Implement `BlockWeights`."""
        values = read_rows(self._source, tensor.name(self._scheme), start, stop)
        return values.astype(np.float32, copy=False)

    def head(self) -> ReadHead:
        """Implement `BlockWeights`; parts are returned as they are stored."""

        def part(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            weight_VD, bias_V = read_head(self._config, self._source, self._scheme, start, stop)
            return weight_VD if self.head_rows else weight_VD.T, bias_V

        return part

    def blocks(
        self, order: Iterable[int], load: Callable[[Sequence[np.ndarray]], None]
    ) -> Iterator[int]:
        """Implement `BlockWeights`."""
        return prefetch_blocks(self._block, order, load)

    def of_block(self, i: int) -> Sequence[Tensor]:
        """Implement `BlockWeights`."""
        return [row for k, pair in self._adapters.items() if k.block == i for row in pair]

    def whole(self, tensor: Tensor) -> np.ndarray:
        """Return a weight in Keras' layout: as stored, or in float32 if it is transposed."""
        name, op = tensor.name(self._scheme), tensor.op(self._scheme, Scheme.KERAS)
        if self.adapted_from_base and tensor in self._adapters:
            name = base_name(tensor)
        values = read_tensor(self._source, name)
        if (in_panels := op(values)).flags.c_contiguous:
            return in_panels
        out = np.empty(values.size, np.float32)
        Strip(values, op).fill(out, 0)
        return out.reshape(tensor.shape_in(Scheme.KERAS))

    def stored(self, tensor: Tensor) -> LazyArray:
        """Return a weight in float32, read when it is asked for."""
        return LazyArray(
            tensor.shape_in(Scheme.TF),
            lambda: self.whole(tensor).astype(np.float32, copy=False),
        )

    def _block(self, i: int) -> list[np.ndarray]:
        adapters = [self._variables[row].numpy() for row in self.of_block(i)]
        return [*(self.whole(t) for t in block(self._config, i)), *adapters]


class _Gradients:
    """`Update` that collects the gradients of an adapter, which are small enough to be in memory
    together."""

    def __init__(self) -> None:
        self.by_row: dict[Tensor, np.ndarray] = {}

    def room(self, tensors: Sequence[Tensor]) -> list[np.ndarray]:
        """Implement `Update`."""
        return [np.empty(t.shape_in(Scheme.KERAS), np.float32) for t in tensors]

    def take(self, gradients: Mapping[Tensor, np.ndarray], *, last: bool) -> None:
        """Implement `Update`."""
        self.by_row |= gradients

    def take_embedding(self, tensor: Tensor, rows: EmbeddingGradient) -> None:
        """Implement `Update`; no adapter covers the embedding."""


def _first_values(lora: Lora, config: GPTJConfig, seed: int) -> dict[Tensor, tf.Variable]:
    """Return random A and zero B, as a resident model starts with."""
    found = {}
    for n, (a, b) in enumerate(lora.rows(config).values()):
        first = first_a(seed, n)(a.shape_in(Scheme.KERAS))
        found[a] = tf.Variable(tf.convert_to_tensor(first))
        found[b] = tf.Variable(tf.zeros(b.shape_in(Scheme.KERAS)))
    return found
