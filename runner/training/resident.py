"""A model that is in memory with its slots, trained by compiled programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptj_model.config import GPTJConfig
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import load_weights, variables
from gptj_model.source import TensorSource
from gptj_model.tensors import Scheme, table
from runner.config.params import Params
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator, ResidentEvaluator
from runner.training.distribution import Workers
from runner.training.executor import StepResult
from runner.training.initialize import initialize
from runner.training.lora import trained_weights
from runner.training.run import checkpoints
from runner.training.step import TrainStep
from runner.training.update.optimizer import Optimizer


class ResidentExecutor:
    """See `Executor`.

    Args:
        config: of the model.
        params: of the run.
        model_dir: the run's folder.
        workers: that train the same model; the first writes its checkpoints.

    Raises:
        ConfigError: see `trainable_rows`.
    """

    saves_every_step = False
    placement = None

    def __init__(
        self, config: GPTJConfig, params: Params, model_dir: Path, workers: Workers
    ) -> None:
        self._config = config
        self._params = params
        self._model_dir = model_dir
        self._workers = workers
        self.model = GPTJ(config, dtype=params.dtype_policy, recompute=params.model.recompute)
        self._adapter, weights = trained_weights(self.model, params)
        self._optimizer = Optimizer(params.optimizer, weights)
        self._compute = TrainStep(
            self.model, self._optimizer, params.optimizer.grad_accum_steps, workers
        )
        self.trained = list(weights)
        self.devices = workers.count

    def load(self, source: TensorSource, scheme: Scheme) -> None:
        """See `Executor`."""
        load_weights(self.model, source, scheme)

    def initialize(self) -> None:
        """See `Executor`."""
        initialize(self.model, self._params)

    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        """See `Executor`."""
        assert self._adapter, "checked"
        self._adapter.begin(values)

    def load_state(self, source: TensorSource, step: int) -> str | None:
        """See `Executor`."""
        if self._adapter:
            if not self._adapter.load(source):
                return "no such adapter: it begins anew"
            self._adapter.load_kernels(source)
        if not self._optimizer.load(source, step):
            return f"no slots of {self._params.optimizer.optimizer_type}: they begin anew"
        return None

    def step(
        self, group: Sequence[Batch], draw: tuple[int, int], scale: float, rate: float
    ) -> StepResult:
        """See `Executor`."""
        self.model.seeds.state.assign(draw)
        return self._compute(group, scale, rate)

    def advance(self) -> None:
        """See `Executor`."""
        self._optimizer.advance()

    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        """See `Executor`."""
        if self._workers.index:
            return checkpoints.prefix(self._model_dir, step)
        found = variables(self.model)
        tensors = {t.tf: found[t.hf] for t in table(self._config)} | self._optimizer.slots
        tensors |= self._optimizer.scalars()
        if self._adapter:
            tensors |= self._adapter.tensors()
        limit = self._params.runconfig.keep_checkpoint_max or 0
        return checkpoints.save(self._model_dir, step, tensors | dict(state), keep=limit)

    def evaluator(self) -> Evaluator:
        """See `Executor`."""
        return ResidentEvaluator(self.model)

    def weights(self) -> Mapping[str, Any]:
        """See `Executor`."""
        return variables(self.model)

    def close(self) -> None:
        """See `Executor`; there are none."""
