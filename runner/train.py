"""Training: from parameters and a checkpoint to a run that can stop and go on at any step."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from gptj_convert.checkpoint import Checkpoint, open_checkpoint
from gptj_convert.formats.tf import STATE_FILE
from gptj_convert.plan import match
from gptj_model.config import CONFIG_FILE, GPTJConfig
from gptj_model.errors import ConfigError, TrainingFault
from gptj_model.loss import token_loss
from gptj_model.model import GPTJ
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import GLOBAL_STEP, Scheme, table
from gptj_model.weights import load_weights, variables
from runner import checkpoints
from runner.data.input_fn import Batch, batches
from runner.evaluate import Evaluator
from runner.optimizer import Optimizer
from runner.params import Params, reconcile
from runner.schedules import learning_rate

METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"


@dataclass(frozen=True, slots=True)
class StepDone:
    """One update. `loss` is the one before it."""

    step: int
    loss: float
    learning_rate: float
    unclipped_grad_norm: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is durable."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Metrics of an evaluation."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Warning:
    """Something a person should know."""

    text: str


Event = StepDone | Saved | Evaluated | Warning


class Run:
    """One model_dir: model, optimizer and step, restored from the newest checkpoint there or
    begun from `init_from`.

    Args:
        params: validated parameters.
        model_dir: the run's folder; made if it does not exist.
        init_from: where a run without checkpoints takes its weights from.
        strict: a damaged newest checkpoint is an error.
        warn: takes what a person should know.

    Raises:
        ConfigError: parameters and checkpoint disagree.
        TrainingFault: no checkpoint is whole.
    """

    def __init__(
        self,
        params: Params,
        model_dir: Path,
        *,
        init_from: Path | None,
        strict: bool = False,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.params = params
        self.model_dir = model_dir
        self.step = 0
        self._warn = warn
        seed = params.model.dropout_seed or params.runconfig.tf_random_seed or 0
        self._seed = seed
        self.continued = bool(checkpoints.steps(model_dir))
        """Whether the folder's own checkpoints were gone on from."""
        if self.continued or (model_dir / STATE_FILE).exists():
            self._continue(strict)
        elif init_from is None:
            raise ConfigError(
                f"{model_dir}: holds no checkpoint to go on from",
                hint="name the weights to begin with: `--init-from converted/`",
            )
        else:
            self._begin(init_from)

    @property
    def weights(self) -> dict[str, Any]:
        """Every variable by TF name."""
        found = variables(self.model)
        return {t.tf: found[t.hf] for t in table(self.config)}

    def save(self) -> Saved:
        """Write a checkpoint of the present step.

        Raises:
            OSError: see `checkpoints.save`.
        """
        state = {**self.weights, **self.optimizer.slots}
        tensors = {name: np.asarray(variable) for name, variable in state.items()}
        tensors |= self.optimizer.scalars(self.step)
        keep = self.params.runconfig.keep_checkpoint_max
        return Saved(self.step, checkpoints.save(self.model_dir, self.step, tensors, keep=keep))

    def _build(self, config: GPTJConfig) -> None:
        self.config = config
        self.model = GPTJ(config, seed=self._seed)
        found = variables(self.model)
        self.optimizer = Optimizer(self.params.optimizer, {t: found[t.hf] for t in table(config)})

    def _continue(self, strict: bool) -> None:
        step, source = checkpoints.open_newest(self.model_dir, strict=strict, warn=self._warn)
        path = self.model_dir / CONFIG_FILE
        # A run of the reference has only its params.yaml.
        config = GPTJConfig.from_file(path) if path.is_file() else self.params.config
        found = Checkpoint(source.prefix, Scheme.TF, config, source, tuple(source.files))
        with found as checkpoint:
            match(checkpoint)
            self._build(reconcile(self.params, config, source.prefix))
            load_weights(self.model, source, Scheme.TF)
            self._load_state(source, step)

    def _begin(self, init_from: Path) -> None:
        with open_checkpoint(init_from) as checkpoint:
            match(checkpoint)
            self._build(reconcile(self.params, checkpoint.config, init_from))
            load_weights(self.model, checkpoint.source, checkpoint.scheme)
            step = stored_step(checkpoint.source)
            if step:
                self._load_state(checkpoint.source, step)
        self.model_dir.mkdir(parents=True, exist_ok=True)
        config = json.dumps(checkpoint.config.to_hf(dtype="float32"), indent=2) + "\n"
        (self.model_dir / CONFIG_FILE).write_text(config, encoding="utf-8")
        for path in checkpoint.companions:
            (self.model_dir / path.name).write_bytes(path.read_bytes())

    def _load_state(self, source: TensorSource, step: int) -> None:
        missing = [name for name in self.optimizer.slots if name not in source.tensors]
        if missing:
            self._warn(
                f"the checkpoint of step {step} has no slots of "
                f"{self.params.optimizer.optimizer_type}: they begin anew, at step 0"
            )
            return
        for name, variable in self.optimizer.slots.items():
            variable.assign(read_tensor(source, name))
        self.step = step


def stored_step(source: TensorSource) -> int:
    """The global step that a checkpoint holds; 0 when it holds none."""
    if GLOBAL_STEP not in source.tensors:
        return 0
    return int(read_tensor(source, GLOBAL_STEP))


def train(
    run: Run, max_steps: int, *, stopped: Callable[[], bool], evaluate: bool = False
) -> Iterator[Event]:
    """Train up to step `max_steps`, saving as the parameters say and at the end.

    Args:
        run: is changed.
        max_steps: the total to reach; a run that has reached it changes nothing.
        stopped: asked after every step; when true, a checkpoint is saved and training ends.
        evaluate: also evaluate on eval_input whenever a checkpoint is saved.

    Raises:
        DataFault: see `batches`.
        TrainingFault: the loss is not finite; the last good checkpoint is kept.
        OSError: a checkpoint or a log cannot be written.
    """
    if run.step >= max_steps:
        return
    params = run.params
    accumulate = params.optimizer.grad_accum_steps
    rate = learning_rate(params.optimizer.learning_rate)
    compute = _gradient_function(run.model)
    evaluator = Evaluator(run.model) if evaluate else None
    data = batches(
        params.train_input,
        vocab_size=run.config.vocab_size,
        training=True,
        skip=run.step * accumulate,
    )
    logs = _Logs(run.model_dir, run.step, params)
    saved_step = run.step
    tokens = params.train_input.batch_size * params.train_input.max_sequence_length * accumulate
    begun = time.monotonic()
    logged_step = run.step
    try:
        while run.step < max_steps:
            group = [b for _, b in zip(range(accumulate), data, strict=False)]
            if len(group) < accumulate:
                yield Warning(f"the training records end after step {run.step}")
                break
            step = run.step + 1
            # Dropout draws from a state that the step alone determines.
            run.model.seeds.state.assign([run._seed, step << 12])
            loss, gradients = _mean_gradients(compute, group)
            if not math.isfinite(loss):
                raise TrainingFault(
                    f"step {step}: the loss is {loss}",
                    hint="lower the learning rate, or clip with optimizer.max_gradient_norm; "
                    f"the last checkpoint kept is of step {saved_step}",
                )
            applied_rate = rate(step - 1)
            norm = run.optimizer.apply(gradients, *run.optimizer.step_arguments(step, applied_rate))
            run.step = step
            if step % params.log_steps == 0:
                now = time.monotonic()
                speed = tokens * (step - logged_step) / (now - begun)
                begun, logged_step = now, step
                event = StepDone(step, loss, applied_rate, float(norm), speed)
                logs.step(event)
                yield event
            if step % params.runconfig.save_checkpoints_steps == 0 and step < max_steps:
                logs.flush()
                yield run.save()
                saved_step = step
                if evaluator:
                    yield from _evaluation(run, evaluator, logs)
                begun, logged_step = time.monotonic(), step
            if stopped():
                break
        if run.step > saved_step:
            logs.flush()
            yield run.save()
        if evaluator and not stopped():
            yield from _evaluation(run, evaluator, logs)
    finally:
        logs.close()


def evaluation_batches(run_params: Params, vocab_size: int) -> Iterator[Batch]:
    """Batches of eval_input.

    Raises:
        ConfigError: the parameters have no such section.
    """
    if run_params.eval_input is None:
        raise ConfigError("eval_input is missing, expected the records to evaluate on")
    return batches(run_params.eval_input, vocab_size=vocab_size, training=False)


def _evaluation(run: Run, evaluator: Evaluator, logs: _Logs) -> Iterator[Event]:
    metrics = evaluator(
        evaluation_batches(run.params, run.config.vocab_size),
        tokens_per_byte=run.params.tokens_per_byte,
        limit=run.params.runconfig.eval_steps,
    )
    event = Evaluated(run.step, metrics)
    logs.evaluation(event)
    yield event


def _gradient_function(model: GPTJ):
    weights = list(variables(model).values())

    # XLA fuses the softmax over the vocabulary, where most of a small model's time goes.
    @tf.function(jit_compile=True)
    def compute(ids_BT, ignored_BT, labels_BT):
        with tf.GradientTape() as tape:
            loss = token_loss(model(ids_BT, training=True), labels_BT, ignored_BT).mean
        gradients = tape.gradient(loss, [w.value for w in weights])
        # The embedding's gradient comes as rows; the norm is that of the whole matrix.
        return loss, [tf.convert_to_tensor(g) for g in gradients]

    return compute


def _mean_gradients(compute, group: list[Batch]) -> tuple[float, list[tf.Tensor]]:
    """Loss and gradients as the means over the batches of each batch's token mean."""
    losses, total = [], None
    for batch in group:
        loss, gradients = compute(*batch)
        losses.append(float(loss))
        total = (
            gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        )
    assert total is not None
    if len(group) > 1:
        total = [g / len(group) for g in total]
    return sum(losses) / len(losses), total


class _Logs:
    """metrics.jsonl and TensorBoard events, continued without a step twice."""

    def __init__(self, model_dir: Path, step: int, params: Params) -> None:
        self._params = params
        self._path = model_dir / METRICS_FILE
        _keep_lines(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = tf.summary.create_file_writer(str(model_dir))

    def step(self, event: StepDone) -> None:
        self._line(
            {
                "step": event.step,
                "loss": event.loss,
                "learning_rate": event.learning_rate,
                "unclipped_grad_norm": event.unclipped_grad_norm,
                "tokens_per_second": round(event.tokens_per_second, 1),
            }
        )
        bits = event.loss / math.log(2) * self._params.tokens_per_byte
        self._summaries(
            event.step,
            {
                "loss": event.loss,
                "train/lm_cost": event.loss,
                "train/lm_perplexity": math.exp(min(event.loss, 80.0)),
                "train/lm_bpb": bits,
                "train/lr": event.learning_rate,
                "train/unclipped_grad_norm": event.unclipped_grad_norm,
            },
        )

    def evaluation(self, event: Evaluated) -> None:
        # `loss` of a row is the training loss of its step; an evaluation has eval/ keys only.
        metrics = {k if "/" in k else f"eval/{k}": v for k, v in event.metrics.items()}
        self._line({"step": event.step, **metrics})
        self._summaries(event.step, metrics)

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def _summaries(self, step: int, values: dict[str, float]) -> None:
        with self._events.as_default():
            for tag, value in values.items():
                tf.summary.scalar(tag, value, step=step)


def _keep_lines(path: Path, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint that it continues from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            break  # the line that the interruption cut
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.rename(path)


@contextmanager
def locked(model_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this process; the kernel frees it when the process ends.

    Raises:
        TrainingFault: another process holds it.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    with (model_dir / LOCK_FILE).open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise TrainingFault(
                f"{model_dir}: another run is writing there (process {f.read().strip() or '?'})",
                hint="wait for it, stop it, or name another --model-dir",
            ) from None
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield


#: Parameters that a continued run may change: how far and how often, not what is computed.
_FREE = ("runconfig", "eval_input")


def accept_changes(params: Params, saved: Params, settings: dict[str, Any]) -> None:
    """Refuse parameters that would make a continued run another one, unless set explicitly.

    Raises:
        ConfigError: each such key, with the saved and the given value.
    """
    given, before = _flat(params.model_dump()), _flat(saved.model_dump())
    problems = [
        f"{key} was {before.get(key)!r}, now {given.get(key)!r}"
        for key in sorted(given.keys() | before.keys())
        if key.split(".")[0] not in _FREE
        and given.get(key) != before.get(key)
        and not any(key == s or key.startswith(f"{s}.") for s in settings)
    ]
    if problems:
        raise ConfigError(
            "the run was begun with other parameters: " + "; ".join(problems),
            hint="accept a change with `--set KEY=VALUE`, or name another --model-dir",
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
