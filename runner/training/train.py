"""The training loop: from parameters and a checkpoint to a run that can stop and resume at any
step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from gptj_convert.checkpoint.open import Checkpoint, open_checkpoint
from gptj_convert.conversion.origin import ORIGIN_KEY, origin
from gptj_convert.conversion.plan import match
from gptj_convert.conversion.source_card import carried_document
from gptj_convert.files.whole_file import write_whole
from gptj_convert.formats.layouts.hf import GENERATION_FILE
from gptj_convert.formats.layouts.tf import STATE_FILE
from gptj_convert.optimizer.decay import decayed, describe
from gptj_convert.optimizer.find import find_state
from gptj_convert.optimizer.in_tf import StateInTf
from gptj_convert.optimizer.state import OptimizerState
from gptj_convert.settings.generation_settings import generation_text
from gptj_model.config import CONFIG_FILE, GPTJConfig
from gptj_model.errors import ConfigError, TrainingFault
from gptj_model.source import TensorSource
from gptj_model.tensors import SKIPPED_STEPS, Scheme
from runner.config.execution import Backend, Execution
from runner.config.params import Params
from runner.config.params_file import reconcile
from runner.data.reading.input_fn import ALL_ROWS, Batch, batches
from runner.data.reading.place import Place, place_after
from runner.evaluation.evaluate import evaluate as metrics_of
from runner.planning.training_cost import check_executor
from runner.training.devices.backend import check_backend
from runner.training.devices.distribution import Alone, Workers, check_same
from runner.training.executors.executor import Executor, StepResult
from runner.training.run import checkpoints
from runner.training.run.events import (
    Evaluated,
    Event,
    Saved,
    Skipped,
    StepDone,
    StoppedEarly,
    Warning,
)
from runner.training.run.folder import kept_config, place_of, stored_skips, stored_step
from runner.training.run.logs import Logs, NoLogs
from runner.training.run.meter import Meter
from runner.training.run.selection import Selection
from runner.training.update.loss_scale import loss_scale
from runner.training.update.schedules import learning_rate
from runner.training.weights.adapter_factors import factors, without_base


class Run:
    """One model_dir: executor, loss scale and step, restored from its newest checkpoint, else
    started from `init_from`, else from random weights.

    Args:
        params: validated parameters.
        model_dir: folder of the run, created if it does not exist.
        init_from: checkpoint that a run without checkpoints starts from, with its step and slots if
            it has any; None starts from random weights.
        adapter: folder of a peft adapter that a run without checkpoints starts from.
        weights_only: whether to take only the weights of `init_from`.
        strict: whether a damaged newest checkpoint is an error.
        workers: workers that train the same model; only the first writes to the folder.
        warn: is called with each warning.

    Raises:
        ConfigError: parameters and checkpoint disagree, or several workers do not support this.
        TrainingFault: every checkpoint is damaged.
    """

    def __init__(
        self,
        params: Params,
        model_dir: Path,
        *,
        init_from: Path | None,
        adapter: Path | None = None,
        weights_only: bool = False,
        strict: bool = False,
        workers: Workers | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.params = params
        self.model_dir = model_dir
        self.workers: Workers = workers or Alone()
        self.step = 0
        self.skipped = 0
        """Number of steps without an update."""
        self.place = Place()
        """Place in the training records after `step`."""
        self._warn = warn
        self._files = ExitStack()
        self._begun_from: Path | None = None
        model = params.model
        self.seed = model.dropout_seed or params.runconfig.tf_random_seed or 0
        refuse_cs_system(params)
        self.continued = bool(checkpoints.steps(model_dir))
        """Whether the run resumes from its own checkpoints."""
        if self.continued or (model_dir / STATE_FILE).exists():
            self._continue(strict)
        elif init_from is None:
            if adapter:
                raise without_base(adapter)
            self._build(params.config)
            self._keep_config(params.config, {}, from_yaml=True)
            self.executor.initialize()
        else:
            self._begin(init_from, adapter, weights_only)
        if not self.step:
            self.place = place_after(params.train_input, params.train_input.skip_steps)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()

    def save(self, *, stays: bool = True) -> Saved:
        """Write a checkpoint of the current step; see `Executor.save`.

        Raises:
            OSError: as `Executor.save` raises it.
        """
        state = self.scale.tensors()
        if self.scale.is_dynamic:
            state |= {SKIPPED_STEPS: np.asarray(self.skipped, np.int64)}
        return Saved(self.step, self.executor.save(self.step, state, stays=stays))

    @property
    def draw(self) -> tuple[int, int]:
        """Return seed and counter of the next step's dropout masks: a function of the position in
        the data and of the worker."""
        seed = self.seed + self.workers.mask_index * _SEED_OF_WORKER
        return seed, (self.step + self.skipped + 1) << 12

    def _build(self, config: GPTJConfig) -> None:
        self.config = config
        self.executor = _executor(config, self.params, self.model_dir, self.workers)
        self._files.callback(self.executor.close)
        self.scale = loss_scale(self.params.optimizer)

    def _continue(self, strict: bool) -> None:
        step, source = checkpoints.open_newest(self.model_dir, strict=strict, warn=self._warn)
        config = kept_config(self.model_dir, self.params)
        found = Checkpoint(source.prefix, Scheme.TF, config, source, tuple(source.files))
        checkpoint = self._files.enter_context(found)
        match(checkpoint)
        self._build(reconcile(self.params, config, source.prefix))
        self.executor.load(source, Scheme.TF)
        self._load_state(source, step)

    def _begin(self, init_from: Path, adapter: Path | None, weights_only: bool) -> None:
        # A streamed model may be read from there as long as the run trains.
        found = open_checkpoint(init_from, with_optimizer=not weights_only)
        checkpoint = self._files.enter_context(found)
        match(checkpoint)
        found_adapter = factors(adapter, checkpoint.config, self.params) if adapter else None
        state = None if weights_only or found_adapter else self._state_in(checkpoint)
        self._build(reconcile(self.params, checkpoint.config, init_from))
        from_yaml = not checkpoint.config_file
        self._keep_config(checkpoint.config, {ORIGIN_KEY: origin(checkpoint)}, from_yaml=from_yaml)
        if not self.workers.index:
            self._keep_files(checkpoint)
        self.executor.load(checkpoint.source, checkpoint.scheme)
        if found_adapter:
            self.executor.load_adapter(found_adapter)
        if state:
            self._begun_from = checkpoint.folder
            self._load_state(state, stored_step(state))

    def _state_in(self, checkpoint: Checkpoint) -> TensorSource | None:
        """Return what a checkpoint holds beside weights, under TensorFlow's names."""
        if checkpoint.scheme is Scheme.TF:
            return checkpoint.source
        if state := find_state(checkpoint):
            if self.params.runconfig.execution != Execution.RESIDENT:
                raise ConfigError(
                    f"{checkpoint.path}: holds the state of an optimizer, which streaming goes on "
                    "with only from a TensorFlow checkpoint",
                    hint=f"make one: `gptj convert {checkpoint.path} --to tf --optimizer-state`; "
                    "or take the weights alone, with --checkpoint-path",
                )
            self._compare_decay(checkpoint, state)
            return StateInTf(checkpoint, state, self.params.optimizer.optimizer_type)
        if checkpoint.scheme is not Scheme.HF:  # a published model has none
            self._warn(f"{checkpoint.path} holds no optimizer state: the run starts at step 0")
        return None

    def _compare_decay(self, checkpoint: Checkpoint, state: OptimizerState) -> None:
        """Warn where these parameters decay other weights than the checkpoint's optimizer did."""
        before, now = state.settings, self.params.optimizer
        if not (before and before.weight_decay_rate and now.weight_decay_rate):
            return
        config = checkpoint.config
        theirs = decayed(config, before.exclude_from_weight_decay)
        ours = decayed(config, now.exclude_from_weight_decay)
        if ours != theirs and now.optimizer_type == "adamw":
            self._warn(
                f"the optimizer of {checkpoint.path} decayed {describe(config, theirs)}, these "
                f"parameters decay {describe(config, ours)}: to decay as before, set "
                f"optimizer.exclude_from_weight_decay to {list(before.exclude_from_weight_decay)}"
            )

    def _keep_config(self, config: GPTJConfig, more: Mapping[str, str], *, from_yaml: bool) -> None:
        """Write the files that describe the model, unless another worker does."""
        if self.workers.index:
            return
        self.model_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config.to_hf(dtype="float32") | dict(more), indent=2) + "\n"
        write_whole(self.model_dir / CONFIG_FILE, text)
        if from_yaml:
            write_whole(self.model_dir / GENERATION_FILE, generation_text(config))

    def _keep_files(self, checkpoint: Checkpoint) -> None:
        """Copy settings, licenses and model card; a document that exists may be the user's."""
        documents = [n for n in checkpoint.documents if not (self.model_dir / n).exists()]
        for name in checkpoint.companions:
            if not (folder := (self.model_dir / name).parent).is_dir():
                folder.mkdir()
            write_whole(self.model_dir / name, (checkpoint.folder / name).read_bytes())
        for name in documents:
            write_whole(self.model_dir / name, carried_document(checkpoint.folder / name))

    def _load_state(self, source: TensorSource, step: int) -> None:
        if not step:
            return
        if missing := self.executor.load_state(source, step):
            self._warn(f"the checkpoint of step {step} has {missing}, at step 0")
            return
        self.scale.load(source)
        self.step = step
        self.skipped = stored_skips(source)
        folder = self.model_dir if self.continued else self._begun_from
        self.place = place_of(source, self.params, folder, continued=self.continued)


#: Difference between the seeds of the dropout masks of one worker and the next.
_SEED_OF_WORKER = 1_000_003


def _executor(config: GPTJConfig, params: Params, model_dir: Path, workers: Workers) -> Executor:
    """Return the executor that the YAML asks for."""
    check_executor(params, workers.count)
    if params.runconfig.backend == Backend.JAX:
        from runner.training.executors.sharded import ShardedExecutor

        check_backend(params)
        return ShardedExecutor(config, params, model_dir, workers)
    # Of TensorFlow, which a run on JAX does without.
    if params.runconfig.execution == Execution.RESIDENT:
        from runner.training.executors.resident import ResidentExecutor

        return ResidentExecutor(config, params, model_dir, workers)
    if params.model.lora:
        from runner.training.streamed.adapter import StreamedAdapterExecutor

        return StreamedAdapterExecutor(config, params, model_dir)
    from runner.training.streamed.executor import StreamedExecutor

    return StreamedExecutor(config, params, model_dir)


def refuse_cs_system(params: Params) -> None:
    """Refuse to compute here what the YAML assigns to a CS system.

    Raises:
        ConfigError: the YAML names a CS system.
    """
    if params.runconfig.cs_ip:
        raise ConfigError(
            f"runconfig.cs_ip is {params.runconfig.cs_ip!r}, and this program trains on this "
            "machine",
            hint="leave it out to train here",
        )


def train(
    run: Run, max_steps: int, *, stopped: Callable[[], bool], evaluate: bool = False
) -> Iterator[Event]:
    """Train up to step `max_steps`, saving as the parameters say and at the end.

    Args:
        run: the run, which is changed.
        max_steps: step to reach; a run that has reached it is unchanged.
        stopped: is called after every step; True saves a checkpoint and ends the training.
        evaluate: whether to evaluate on eval_input whenever a checkpoint is saved.

    Raises:
        DataFault: as `batches` raises it.
        TrainingFault: loss or gradients are not finite; the last good checkpoint is kept.
        OSError: a checkpoint or a log cannot be written.
    """
    selection = Selection(run.model_dir, run.params.runconfig, run.step)
    if evaluate and (reason := selection.stop):
        yield StoppedEarly(run.step, reason)
        return
    if is_finished(run, max_steps, evaluate=evaluate):
        return
    logs = NoLogs() if run.workers.index else Logs(run.model_dir, run.step, run.params)
    try:
        training = _Training(run, max_steps, logs, selection if evaluate else None)
        yield from training.events(stopped)
    finally:
        logs.close()


def is_finished(run: Run, max_steps: int, *, evaluate: bool) -> bool:
    """Return whether nothing is left to train, nor to evaluate; see `train` for the arguments."""
    selection = Selection(run.model_dir, run.params.runconfig, run.step)
    if evaluate and selection.stop:
        return True
    awaits = evaluate and awaits_evaluation(run, selection, max_steps)
    return run.step >= max_steps and not awaits


def awaits_evaluation(run: Run, selection: Selection, max_steps: int) -> bool:
    """Return whether a run was interrupted between a checkpoint and its evaluation."""
    due = run.step % run.params.runconfig.save_checkpoints_steps == 0 or run.step == max_steps
    return run.continued and run.step > 0 and due and not selection.has(run.step)


class _Training:
    """State of the loop of `train`."""

    def __init__(
        self, run: Run, max_steps: int, logs: Logs | NoLogs, selection: Selection | None
    ) -> None:
        params = run.params
        self._run = run
        self._params = params
        self._max_steps = max_steps
        self._logs = logs
        self._group = params.optimizer.grad_accum_steps
        self._rate = learning_rate(
            params.optimizer.learning_rate, reset=not params.optimizer.disable_lr_steps_reset
        )
        self._selection = None if run.workers.index else selection
        self._evaluates = bool(selection) and (
            not run.workers.index or run.workers.decides_together
        )
        self._evaluator = run.executor.evaluator() if self._evaluates else None
        self._evaluated_at = -math.inf
        self._saved_step = self._told_step = run.step
        length = params.train_input.max_sequence_length
        tokens = params.train_input.batch_size * length * self._group
        self._meter = Meter(
            run.config,
            tokens=tokens,
            length=length,
            trained=run.executor.trained,
            devices=run.executor.devices,
        )

    def events(self, stopped: Callable[[], bool]) -> Iterator[Event]:
        run = self._run
        self._agree()
        data = batches(
            self._params.train_input,
            vocab_size=run.config.vocab_size,
            training=True,
            start=run.place,
            rows=run.executor.rows(self._params.train_input.batch_size),
        )
        selection = self._selection
        if selection and run.continued:
            selection.keep_best()
        if self._first_says(bool(selection and awaits_evaluation(run, selection, self._max_steps))):
            yield from self._evaluation()
        while run.step < self._max_steps and not self._ends(stopped):
            self._meter.begin()
            group = [b for _, b in zip(range(self._group), data, strict=False)]
            if len(group) < self._group:
                yield Warning(f"the training records end after step {run.step}")
                break
            run.place = data.place
            yield from self._step(group)
        if run.step > self._told_step:
            yield self._save()
        ended = selection if selection and not stopped() else None
        if self._first_says(bool(ended and not ended.has(run.step))):
            yield from self._evaluation()
        if ended and (reason := ended.stop):
            yield StoppedEarly(run.step, reason)

    def _first_says(self, evaluates: bool) -> bool:
        """Return whether to evaluate now, which the first worker knows, where all do it together;
        else only the first does."""
        if not (self._evaluates and self._run.workers.decides_together):
            return evaluates
        return bool(self._run.workers.total([evaluates])[0])

    def _ends(self, stopped: Callable[[], bool]) -> bool:
        """Return whether the run ends before max_steps, which all workers decide together: one
        that stops alone would leave the others waiting."""
        asked = stopped() or bool(self._selection and self._selection.stop)
        return bool(self._run.workers.total([asked])[0])

    def _agree(self) -> None:
        """Check that all workers start at the same place.

        Raises:
            TrainingFault: they start at different places.
        """
        run = self._run
        if run.workers.count == 1:
            return
        sums = [float(np.sum(v)) for v in run.executor.weights().values()]
        if not check_same(run.workers, [run.step, run.skipped, *run.place, *sums]):
            raise TrainingFault(
                f"worker {run.workers.index} begins at step {run.step}, and not all have the same "
                "step and weights",
                hint="give all of them the same model directory on a shared disk, the same weights "
                "to begin with, and the same parameters",
            )

    def _step(self, group: list[Batch]) -> Iterator[Event]:
        run = self._run
        rate = self._rate(run.step)
        found = run.executor.step(group, run.draw, run.scale.value, rate)
        finite = math.isfinite(found.norm)
        if not finite:
            self._refuse_to_diverge(found)
            run.skipped += 1
            run.scale.update(False)
            yield Skipped(run.step, run.scale.value)
            return
        run.scale.update(True)
        run.executor.advance()
        run.step += 1
        self._meter.end()
        if run.step % self._params.log_steps == 0:
            event = StepDone(
                step=run.step,
                loss=found.loss,
                learning_rate=rate,
                unclipped_grad_norm=found.norm,
                loss_scale=run.scale.value if run.scale.is_dynamic else None,
                skipped=run.skipped,
                resources=self._meter.figures(self._max_steps - run.step),
            )
            self._logs.step(event)
            yield event
        runconfig = self._params.runconfig
        if self._params.optimizer.log_hists and run.step % runconfig.save_summary_steps == 0:
            self._logs.histograms(run.step, run.executor.weights())
        if run.step % runconfig.save_checkpoints_steps == 0 and run.step < self._max_steps:
            yield self._save()
            waited = time.monotonic() - self._evaluated_at
            if self._first_says(bool(self._selection) and waited >= runconfig.throttle_secs):
                yield from self._evaluation()
        elif run.executor.saves_every_step:
            self._keep(stays=False)

    def _refuse_to_diverge(self, found: StepResult) -> None:
        run = self._run
        what = "the loss" if not math.isfinite(found.loss) else "the norm of the gradients"
        value = found.loss if not math.isfinite(found.loss) else found.norm
        kept = f"the last checkpoint is of step {self._saved_step}"
        hint = f"lower the learning rate, or clip with optimizer.max_gradient_norm; {kept}"
        if not run.scale.is_dynamic:
            text = f"step {run.step + 1}: {what} is {value}"
            if run.scale.value > 1 and math.isfinite(found.loss):
                text += f" with the fixed loss scale {run.scale.value:g}"
                hint = (
                    "--set optimizer.loss_scaling_factor=dynamic, or a smaller number than "
                    f"{run.scale.value:g}; {kept}"
                )
            raise TrainingFault(text, hint=hint)
        if run.scale.at_floor:
            raise TrainingFault(
                f"step {run.step + 1}: {what} is {value} although the loss scale has fallen to "
                f"{run.scale.value:g}, its least; {run.skipped} steps were skipped",
                hint=hint,
            )

    def _save(self) -> Saved:
        saved = self._keep(stays=True)
        self._told_step = saved.step
        return saved

    def _keep(self, *, stays: bool) -> Saved:
        self._logs.flush()
        saved = self._run.save(stays=stays)
        self._saved_step = saved.step
        return saved

    def _evaluation(self) -> Iterator[Event]:
        assert self._evaluator, "checked by _first_says"
        run = self._run
        together = (run.executor.rows,) if run.workers.decides_together else ()
        metrics = metrics_of(
            self._evaluator,
            evaluation_batches(self._params, run.config.vocab_size, *together),
            tokens_per_byte=self._params.tokens_per_byte,
            limit=self._params.eval_limit,
        )
        self._evaluated_at = time.monotonic()
        if not (selection := self._selection):
            return
        step = run.step
        selection.add(step, metrics)
        best = selection.best
        event = Evaluated(step, metrics, is_best=best is not None and best.step == step)
        self._logs.evaluation(event)
        self._logs.flush()
        selection.keep_best()
        yield event


def evaluation_batches(
    run_params: Params, vocab_size: int, rows: Callable[[int], slice] = lambda batch_size: ALL_ROWS
) -> Iterator[Batch]:
    """Return the batches of eval_input.

    Args:
        run_params: parameters of the run.
        vocab_size: size of the model's vocabulary.
        rows: returns the rows of a batch that this process computes.

    Raises:
        ConfigError: the parameters have no such section.
    """
    if run_params.eval_input is None:
        raise ConfigError("eval_input is missing, expected the records to evaluate on")
    section = run_params.eval_input
    mine = rows(section.batch_size)
    return batches(section, vocab_size=vocab_size, training=False, rows=mine)
