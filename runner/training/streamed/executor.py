"""Training of a model whose weights and slots are on disk, streamed block by block and updated
there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.config import GPTJConfig
from gptj_model.page_buffers import page_buffers
from gptj_model.source import TensorSource, read_tensor
from gptj_model.streaming.forward import StreamedModel
from gptj_model.streaming.training import Draw
from gptj_model.tensors import Scheme, table
from runner.config.params import Params
from runner.config.trainable import trainable_rows
from runner.data.reading.input_fn import Batch
from runner.evaluation.evaluate import Evaluator, StreamedEvaluator
from runner.planning.training_cost import slots_dtype, waiting_gradients
from runner.training.executors.executor import Executor, StepResult
from runner.training.run import checkpoints
from runner.training.streamed.background import Background
from runner.training.streamed.malloc_trim import keep_freed_memory
from runner.training.streamed.passes import borrow_passes
from runner.training.streamed.scratch import Scratch
from runner.training.streamed.state import StreamedState
from runner.training.streamed.step import StreamedStep, states_bytes
from runner.training.streamed.update import StreamedUpdate, room_bytes
from runner.training.update.rule import BetaPowers, UpdateRule
from runner.training.weights.initialize import first_values
from runner.training.weights.lazy_array import LazyArray


class StreamedExecutor(Executor):
    """Executor of a streamed model. Its state is a checkpoint, and every step ends with one: the
    update and the durable write continue during the next step's forward pass.

    Args:
        config: configuration of the model.
        params: parameters of the run.
        model_dir: folder of the run; its disk also holds the scratch file of a step.

    Raises:
        ConfigError: as `trainable_rows` raises it.
    """

    saves_every_step = True

    def __init__(self, config: GPTJConfig, params: Params, model_dir: Path) -> None:
        self._config = config
        self._params = params
        self._model_dir = model_dir
        self.trained = trainable_rows(config, params)
        self._rule = UpdateRule(params.optimizer, np)
        self._powers = BetaPowers(params.optimizer)
        self._state = StreamedState(
            config, self._rule, self.trained, model_dir, slots_dtype=slots_dtype(params)
        )
        self._passes = borrow_passes(config, params, head_rows=config.tie_word_embeddings)
        (self._gradients,) = page_buffers(1, room_bytes(config))
        self._scratch: Scratch | None = None
        self._background = Background("update")

    @override
    def load(self, source: TensorSource, scheme: Scheme) -> None:
        """Load the weights of a checkpoint; the float32 weights of a bundle are read where they
        are."""
        rows = table(self._config)
        if (
            scheme is Scheme.TF
            and isinstance(source, BundleSource)
            and all(source.tensors[t.tf].dtype == "float32" for t in rows)
        ):
            self._state.open(source.prefix)
            return
        self._state.begin(
            (t, t.op(scheme, Scheme.TF)(read_tensor(source, t.name(scheme)))) for t in rows
        )

    @override
    def initialize(self) -> None:
        self._state.begin(first_values(self._config, self._params))

    @override
    def load_adapter(self, values: Mapping[str, np.ndarray]) -> None:
        """Refuse an adapter: all weights are trained here."""
        raise NotImplementedError

    @override
    def load_state(self, source: TensorSource, step: int) -> str | None:
        if not self._state.take_slots():
            return f"no slots of {self._params.optimizer.optimizer_type}: they start from zero"
        self._powers.load(source, step)
        return None

    @override
    def step(self, group: Sequence[Batch], draw: Draw, scale: float, rate: float) -> StepResult:
        batches = [tuple(map(np.asarray, batch)) for batch in group]
        if self._scratch is None:
            waiting = waiting_gradients(self._config, self._params, self.trained)
            kept = [*states_bytes(self._config, batches), *(4 * t.size for t in waiting)]
            self._scratch = Scratch(self._model_dir, kept)
        update = StreamedUpdate(
            self._state,
            self._rule,
            self._gradients,
            self._scratch,
            self._background,
            rate,
            self._powers.correction,
            draw,
        )
        step = StreamedStep(
            self._config, self._passes.model, self._state, self._scratch, update, self.trained
        )
        try:
            loss = step.run(batches, draw, scale)
            norm = update.finish()
        except BaseException:
            self._background.wait()
            self._state.discard()
            raise
        # Only after the first step, whose compiled programs would otherwise lie in between.
        keep_freed_memory()
        return StepResult(loss, norm)

    @override
    def advance(self) -> None:
        self._powers.advance()

    @override
    def save(self, step: int, state: Mapping[str, np.ndarray], *, stays: bool) -> Path:
        keep = self._params.runconfig.keep_checkpoint_max or 0
        scalars = {**state, **self._powers.scalars()}
        commit = partial(self._state.commit, step, scalars, stays=stays, keep=keep)
        self._background.submit(commit)
        if stays:
            self._background.wait()
        return checkpoints.prefix(self._model_dir, step)

    @override
    def evaluator(self) -> Evaluator:
        return StreamedEvaluator(
            lambda: StreamedModel(
                self._config, self._state.source, Scheme.TF, memory=self._state.memory
            )
        )

    @override
    def weights(self) -> Mapping[str, Any]:
        return {
            t.hf: LazyArray(t.shape_in(Scheme.TF), partial(self._state.rows, t))
            for t in table(self._config)
        }

    @override
    def close(self) -> None:
        self._background.close()
        self._state.discard()
        self._state.close()
        if self._scratch:
            self._scratch.close()
        self._passes.give_back()
