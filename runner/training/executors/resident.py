"""Training of a model in memory by compiled programs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from gptj_model.config import GPTJConfig
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import forget, load_weights, variables
from gptj_model.source import TensorSource
from gptj_model.tensors import Scheme, table
from runner.config.params import Params
from runner.data.reading.input_fn import Batch
from runner.evaluation import reuse
from runner.evaluation.compiled import ResidentEvaluator
from runner.evaluation.evaluate import Evaluator
from runner.training.devices.distribution import Workers
from runner.training.executors.executor import Executor, StepResult
from runner.training.executors.step import TrainStep
from runner.training.run import checkpoints
from runner.training.update.optimizer import Optimizer
from runner.training.weights.initialize import initialization_seed, initialize
from runner.training.weights.lora import trained_weights


class ResidentModel:
    """A model, its slots and the programs that train and evaluate it, compiled on first use.

    Args:
        config: configuration of the model.
        params: parameters of the run.
        workers: workers that train the same model.

    Raises:
        ConfigError: as `trainable_rows` raises it.
    """

    def __init__(self, config: GPTJConfig, params: Params, workers: Workers) -> None:
        self.model = GPTJ(config, dtype=params.dtype_policy, recompute=params.model.recompute)
        self.adapter, weights = trained_weights(self.model, params)
        self.optimizer = Optimizer(params.optimizer, weights)
        self.step = TrainStep(
            self.model, self.optimizer, params.optimizer.grad_accum_steps, workers
        )
        self.evaluator = ResidentEvaluator(self.model)

    def reset(self, params: Params) -> None:
        """Become what was made for these parameters, with NaN as weights."""
        forget(variables(self.model).values())
        self.optimizer.reset()
        if self.adapter:
            self.adapter.initialize(initialization_seed(params))


def _shape(config: GPTJConfig, params: Params) -> Hashable:
    """Return all that a `ResidentModel` of a single process depends on."""
    model = replace(
        config, n_inner=config.ffn_dim, bos_token_id=None, eos_token_id=None, carried={}
    )
    sections = (
        params.model.model_dump_json(),
        params.optimizer.model_dump_json(exclude={"learning_rate"}),
    )
    return ResidentModel, model, params.dtype_policy, sections


class ResidentExecutor(Executor):
    """Executor of a model whose weights and slots are in memory.

    Args:
        config: configuration of the model.
        params: parameters of the run.
        model_dir: folder of the run.
        workers: workers that train the same model; the first writes its checkpoints.

    Raises:
        ConfigError: as `trainable_rows` raises it.
    """

    @override
    def __init__(
        self, config: GPTJConfig, params: Params, model_dir: Path, workers: Workers
    ) -> None:
        self._config = config
        self._params = params
        self._model_dir = model_dir
        self._workers = workers
        self._borrowed = reuse.borrow(
            _shape(config, params) if workers.count == 1 else object(),
            lambda: ResidentModel(config, params, workers),
            lambda model: model.reset(params),
        )
        self._resident = self._borrowed.model
        self.model = self._resident.model
        self._adapter = self._resident.adapter
        self._optimizer = self._resident.optimizer
        self.trained = list(self._optimizer.weights)
        self.devices = workers.count

    @override
    def rows(self, batch_size: int) -> slice:
        return slice(self._workers.index, None, self._workers.count)

    @override
    def load(self, source: TensorSource, scheme: Scheme) -> None:
        load_weights(self.model, source, scheme)

    @override
    def initialize(self) -> None:
        initialize(variables(self.model), self._config, self._params)

    @override
    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        assert self._adapter, "checked"
        self._adapter.begin(values)

    @override
    def load_state(self, source: TensorSource, step: int) -> str | None:
        if self._adapter:
            if not self._adapter.load(source):
                return "no such adapter: training starts with a new one"
            self._adapter.load_kernels(source)
        if not self._optimizer.load(source, step):
            return f"no slots of {self._params.optimizer.optimizer_type}: they start from zero"
        return None

    @override
    def step(
        self, group: Sequence[Batch], draw: tuple[int, int], scale: float, rate: float
    ) -> StepResult:
        self.model.seeds.state.assign(draw)
        return self._resident.step(group, scale, rate)

    @override
    def advance(self) -> None:
        self._optimizer.advance()

    @override
    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        if self._workers.index:
            return checkpoints.prefix(self._model_dir, step)
        found = variables(self.model)
        tensors = {t.tf: found[t.hf] for t in table(self._config)} | self._optimizer.slots
        tensors |= self._optimizer.scalars()
        if self._adapter:
            tensors |= self._adapter.tensors()
        limit = self._params.runconfig.keep_checkpoint_max or 0
        return checkpoints.save(self._model_dir, step, tensors | dict(state), keep=limit)

    @override
    def evaluator(self) -> Evaluator:
        return self._resident.evaluator

    @override
    def weights(self) -> Mapping[str, Any]:
        return variables(self.model)

    @override
    def close(self) -> None:
        if self._workers.count == 1:
            self._borrowed.give_back()
