"""One run of training or evaluation: what `gptj train` and `runner.run` both do and show."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import rich_click as click

from runner.cli.errors import Exit
from runner.cli.output import Output
from runner.cli.training_display import training_display
from runner.execution import Backend, Execution

if TYPE_CHECKING:
    from gptj_model.config import GPTJConfig
    from gptj_model.tensors import Tensor
    from runner.distribution import Cluster, Workers
    from runner.params import Params
    from runner.train import Run
    from runner.training_plan import TrainingPlan

MODES = ("train", "eval", "eval_all", "train_and_eval")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What was asked for on a command line."""

    model_dir: Path
    mode: str
    params_file: Path | None = None
    init_from: Path | None = None
    """Weights to begin with, and their step and slots."""
    checkpoint_path: Path | None = None
    """Weights to begin with and nothing else, or to evaluate."""
    max_steps: int | None = None
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False
    workers: int | None = None
    """Processes of this machine that train together; None: as the parameters say."""
    only: Literal["validate", "compile"] | None = None
    """Stop before the first step."""

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.steps is not None:
            raise click.UsageError("--max-steps and --steps exclude each other")
        if self.only and self.mode not in ("train", "eval"):
            raise click.UsageError(f"mode {self.mode} cannot be compiled, expected train or eval")


def run_job(output: Output, job: Job) -> dict[str, Any]:
    """Do it; returns the fields of the command's JSON object."""
    from runner.backend import check_backend
    from runner.cli import tensorflow
    from runner.cli.local_workers import run_workers
    from runner.distribution import join

    params = _params(job)
    check_backend(params, mode=job.mode, workers=job.workers or 1)
    begin = job.checkpoint_path or _path(params.runconfig.checkpoint_path)
    if job.only:
        return _rehearse(output, job, _accepted(job, params), begin)
    if job.mode in ("eval", "eval_all"):
        tensorflow.prepare(backend=params.runconfig.backend)
        return _evaluate(output, job, params, begin)
    cluster, count = _together(job, params)
    params = _accepted(job, params, count)
    if count > 1 and cluster is None:
        raise click.exceptions.Exit(run_workers(count))
    tensorflow.prepare(backend=params.runconfig.backend)
    workers = join(cluster, output.note)
    if workers.index:
        output.note(f"worker {workers.index} of {workers.count}: the first one tells how it goes")
        output = Output(json=output.json, quiet=True)
    return _train(output, job, params, begin, workers)


def _together(job: Job, params: Params) -> tuple[Cluster | None, int]:
    """Who trains together, if they have been started already, and how many.

    Raises:
        ConfigError: the parameters speak of other machines, and nothing says which.
    """
    from gptj_model.errors import ConfigError
    from runner.cli.local_workers import visible_gpus
    from runner.distribution import TF_CONFIG, cluster_here

    runconfig = params.runconfig
    if not (job.workers or runconfig.enable_distributed):
        return None, 1
    if cluster := cluster_here():
        return cluster, cluster.count
    if runconfig.multiple_workers and not job.workers:
        raise ConfigError(
            f"runconfig.multiple_workers is true, and {TF_CONFIG} does not say who they are",
            hint="set it on each of them, or train on this machine with "
            "--set runconfig.multiple_workers=false",
        )
    return None, job.workers or max(1, len(visible_gpus()))


def _accepted(job: Job, params: Params, workers: int | None = None) -> Params:
    """The parameters as they are kept, once it is seen that a run may go on with them.

    Args:
        job: what was asked for.
        params: as they were given.
        workers: how many train together; None: that is not known yet.

    Raises:
        ConfigError: see `accept_changes`.
    """
    from gptj_convert.reference_yaml import PARAMS_FILE
    from runner import checkpoints
    from runner.params_file import load_params
    from runner.run_folder import accept_changes

    saved = job.model_dir / PARAMS_FILE
    before = None
    if checkpoints.steps(job.model_dir) and saved.is_file():
        before = load_params(saved)
        workers = workers or before.runconfig.workers
    runconfig = params.runconfig.model_copy(update={"workers": workers or 1})
    params = params.model_copy(update={"runconfig": runconfig})
    if before and job.mode in ("train", "train_and_eval"):
        accept_changes(params, before, job.settings)
    return params


def plan_job(output: Output, job: Job) -> dict[str, Any]:
    """Say what training takes; nothing is loaded or written but a measurement's moment."""
    from gptj_convert import machine
    from gptj_convert.rates import measure
    from runner import checkpoints

    params = _accepted(job, _params(job))
    plan = _plan(job, params)
    here = next(p for p in (job.model_dir, *job.model_dir.resolve().parents) if p.is_dir())
    rates = measure(here)
    missing = plan.missing_disk(len(checkpoints.steps(job.model_dir)))
    seconds, free = plan.seconds(rates), machine.disk_free(here)
    available = machine.memory_available()
    output.data(f"execution  {plan.execution}")
    output.data(f"memory     {plan.memory / 1e9:.2f} GB, {available / 1e9:.1f} GB available")
    output.data(
        f"disk       {plan.disk / 1e9:.2f} GB: {plan.states} × {plan.state / 1e9:.2f} GB of "
        f"checkpoints, {plan.scratch / 1e9:.2f} GB while a step goes on; {free / 1e9:.1f} GB free"
    )
    output.data(
        f"a step     {plan.read / 1e9:.2f} GB read, {plan.written / 1e9:.2f} GB written, "
        f"{plan.flops / 1e12:.3g} TFLOP, about {seconds:.0f} s"
    )
    return {
        "execution": plan.execution,
        "planned_rss_bytes": plan.memory,
        "disk_bytes": plan.disk,
        "read_bytes": plan.read,
        "written_bytes": plan.written,
        "flops": round(plan.flops),
        "seconds_per_step": round(seconds, 3),
        "fits": plan.memory <= available and missing <= free,
    }


def _plan(job: Job, params: Params) -> TrainingPlan:
    from gptj_convert.checkpoint import open_checkpoint
    from runner import checkpoints
    from runner.params_file import reconcile
    from runner.training_plan import plan_training

    steps = checkpoints.steps(job.model_dir)
    begin = checkpoints.prefix(job.model_dir, steps[-1]) if steps else None
    begin = begin or job.init_from or job.checkpoint_path or _path(params.runconfig.checkpoint_path)
    if begin is None:
        return plan_training(params.config, params)
    with open_checkpoint(begin) as checkpoint:
        return plan_training(reconcile(params, checkpoint.config, begin), params)


def _refuse_a_full_disk(job: Job, params: Params) -> None:
    """Before hours of work rather than after.

    Raises:
        FileFault: the disk lacks space for what the run keeps there.
    """
    from gptj_convert import machine
    from gptj_model.errors import FileFault
    from runner import checkpoints

    plan = _plan(job, params)
    needed = plan.missing_disk(len(checkpoints.steps(job.model_dir)))
    if needed > (free := machine.disk_free(job.model_dir)):
        raise FileFault(
            f"{job.model_dir}: the run needs {needed / 1e9:.2f} GB of disk for {plan.states} "
            f"checkpoints and what a step keeps, {free / 1e9:.2f} GB are free",
            hint="name a --model-dir on another disk, or keep fewer with "
            "`--set runconfig.keep_checkpoint_max=1`",
        )


def _path(name: str | None) -> Path | None:
    return Path(name) if name else None


def _train(
    output: Output, job: Job, params: Params, begin: Path | None, workers: Workers
) -> dict[str, Any]:
    import tensorflow as tf

    from gptj_convert.reference_yaml import PARAMS_FILE
    from gptj_convert.whole_file import write_whole
    from runner import train as training
    from runner.data.records import find_records
    from runner.run_folder import locked

    find_records(params.train_input.data_dir)  # before the model is loaded
    stop = _StopSignals()
    with ExitStack() as stack:
        if not workers.index:
            stack.enter_context(locked(job.model_dir))
        if params.runconfig.execution == Execution.STREAMING:
            _refuse_a_full_disk(job, params)
        stack.enter_context(stop)
        stack.enter_context(tf.device(params.runconfig.device))
        run = training.Run(
            params,
            job.model_dir,
            init_from=job.init_from or begin,
            weights_only=job.init_from is None,
            strict=job.strict,
            workers=workers,
            warn=_warner(output),
        )
        stack.enter_context(run)
        if not workers.index:
            write_whole(job.model_dir / PARAMS_FILE, params.to_yaml())
        if (job.init_from or begin) and run.continued:
            output.note(f"note: {job.model_dir} has checkpoints, so no other weights are read")
        target = _target(job, params, run.step)
        _announce(output, run, target, job.init_from or begin)
        show = stack.enter_context(training_display(output, target))
        evaluate = job.mode == "train_and_eval"
        for event in training.train(run, target, stopped=stop.asked, evaluate=evaluate):
            show(event)
    if stop.code is not None:
        output.note(f"stopped after step {run.step}, which is saved; the same command goes on")
    fields = {"output": str(job.model_dir), "step": run.step}
    return fields | {"exit": stop.code if stop.code is not None else Exit.OK}


def _target(job: Job, params: Params, step: int) -> int:
    """The step to train to."""
    if job.max_steps is not None:
        return job.max_steps
    more = job.steps if job.steps is not None else params.runconfig.steps
    return params.runconfig.max_steps if more is None else step + more


class _StopSignals:
    """SIGINT and SIGTERM ask the run to stop after its step; a second one stops it at once."""

    def __init__(self) -> None:
        self.code: Exit | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.code is not None

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: object) -> None:
        self.code = Exit.INTERRUPTED if number == signal.SIGINT else Exit.TERMINATED
        self.__exit__()


def _params(job: Job) -> Params:
    """Parameters of the run: those it was begun with, unless a file is named."""
    from gptj_convert.checkpoint import open_checkpoint
    from gptj_convert.reference_yaml import PARAMS_FILE
    from gptj_model.errors import ConfigError
    from runner import checkpoints
    from runner.cli.model_choice import params_for
    from runner.params_file import load_params

    saved = job.model_dir / PARAMS_FILE
    if checkpoints.steps(job.model_dir) and saved.is_file():
        return load_params(job.params_file or saved, job.settings)
    if job.params_file:
        return load_params(job.params_file, job.settings)
    begin = job.init_from or job.checkpoint_path
    if begin is None:
        raise ConfigError(
            f"{job.model_dir}: holds no run to go on with",
            hint="begin one: `gptj train --init-from converted/`, or from nothing with --params",
        )
    with open_checkpoint(begin) as checkpoint:
        return params_for(begin, None, dict(job.settings), checkpoint.config)


def _evaluate(output: Output, job: Job, params: Params, begin: Path | None) -> dict[str, Any]:
    from runner import checkpoints
    from runner.cli.eval import evaluate_model

    begin = job.checkpoint_path or job.init_from or begin
    steps = checkpoints.steps(job.model_dir)
    if job.mode == "eval" and begin and (job.checkpoint_path or not steps):
        return {"metrics": evaluate_model(output, begin, params)}
    if not steps:
        raise click.UsageError(f"{job.model_dir} holds no checkpoint to evaluate")
    metrics = {}
    for step in steps if job.mode == "eval_all" else steps[-1:]:
        prefix = checkpoints.prefix(job.model_dir, step)
        metrics = evaluate_model(output, prefix, params) | {"global_step": step}
    return {"metrics": metrics}


def _rehearse(output: Output, job: Job, params: Params, begin: Path | None) -> dict[str, Any]:
    """Everything up to the first step: parameters, records and headers; compiled if asked."""
    from gptj_convert import capacity
    from gptj_convert.checkpoint import open_checkpoint
    from gptj_convert.plan import match
    from runner.data.records import check_records, find_records
    from runner.params_file import reconcile
    from runner.trained import trained_rows
    from runner.training_plan import plan_training

    if job.only == "compile" and params.runconfig.execution == Execution.STREAMING:
        raise click.UsageError("--compile-only compiles the step of a resident run")
    config = params.config
    section = params.train_input if job.mode == "train" else params.eval_input
    if section is None:
        raise click.UsageError("eval_input is missing, expected the records to evaluate on")
    if begin := job.init_from or begin:
        with open_checkpoint(begin) as checkpoint:
            match(checkpoint)
            config = reconcile(params, checkpoint.config, begin)
    paths = find_records(section.data_dir)
    check_records(paths, length=section.max_sequence_length, vocab_size=config.vocab_size,
                  only_first=True)  # fmt: skip
    tokens = section.batch_size * section.max_sequence_length
    trained = trained_rows(config, params)
    flops = tokens * capacity.token_flops(config, section.max_sequence_length, trained)
    if job.mode == "eval":
        flops = tokens * capacity.token_flops(config, section.max_sequence_length) / 3
    fields: dict[str, Any] = {
        "parameters": capacity.parameters(config),
        "trained_parameters": sum(t.size for t in trained),
        "flops_per_batch": round(flops),
    }
    if _on_jax(params):
        planned, memory = _planned_devices(params, config, trained)
    else:
        rss = plan_training(config, params).memory
        planned, memory = {"planned_rss_bytes": rss}, f"{rss / 1e9:.2f} GB of memory planned"
    fields |= planned
    if job.only == "compile":
        fields |= _compile(output, job, params)
    output.data(
        f"{fields['parameters']:,} parameters, {fields['trained_parameters']:,} of them trained; "
        f"a batch of {tokens:,} tokens takes {flops / 1e12:.3g} TFLOP; {memory}"
    )
    return fields


def _on_jax(params: Params) -> bool:
    return params.runconfig.backend == Backend.JAX


def _planned_devices(
    params: Params, config: GPTJConfig, trained: Sequence[Tensor]
) -> tuple[dict[str, Any], str]:
    """What each device of the mesh will hold; nothing heavy is imported if the mesh is named."""
    from gptj_convert import capacity
    from gptj_model.tensors import SLOTS
    from runner.backend import mesh_of

    def devices() -> int:
        import jax

        return jax.device_count()

    mesh, optimizer = mesh_of(params, devices), params.optimizer
    held = capacity.device_state(
        config,
        mesh,
        trained=trained,
        slots=len(SLOTS[optimizer.optimizer_type]),
        accumulated=optimizer.grad_accum_steps > 1,
    )
    total = sum(held.values())
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in held.items())
    return (
        {"mesh": [mesh.batch, mesh.model], "bytes_per_device": held | {"total": total}},
        f"each of {mesh} devices (batch × model) holds {total / 1e9:.2f} GB beside activations: "
        + parts,
    )


def _compile(output: Output, job: Job, params: Params) -> dict[str, Any]:
    from runner.cli import tensorflow

    tensorflow.prepare(backend=params.runconfig.backend)
    if _on_jax(params):
        return _compile_sharded(output, job, params)
    from gptj_model.model import GPTJ
    from runner.distribution import Alone
    from runner.evaluate import ResidentEvaluator
    from runner.lora import trained_weights
    from runner.optimizer import Optimizer
    from runner.step import TrainStep, empty_batch

    config = params.config
    model = GPTJ(config, dtype=params.dtype_policy, recompute=params.model.recompute)
    section = params.train_input if job.mode == "train" else params.eval_input
    assert section is not None, "checked"
    batch = empty_batch(section.batch_size, section.max_sequence_length)
    begun = time.monotonic()
    if job.mode == "train":
        _, weights = trained_weights(model, params)
        optimizer = Optimizer(params.optimizer, weights)
        accumulate = params.optimizer.grad_accum_steps
        program = TrainStep(model, optimizer, accumulate, Alone()).compiled(batch)
    else:
        program = ResidentEvaluator(model).compiled(batch)
    seconds = time.monotonic() - begun
    instructions = program.count(" = ")
    output.data(f"compiled in {seconds:.1f} s to {instructions:,} instructions")
    return {"compile_seconds": round(seconds, 3), "instructions": instructions}


def _compile_sharded(output: Output, job: Job, params: Params) -> dict[str, Any]:
    from runner.sharded_executor import ShardedExecutor
    from runner.step import empty_batch

    section = params.train_input
    batch = empty_batch(section.batch_size, section.max_sequence_length)
    executor = ShardedExecutor(params.config, params, job.model_dir)
    begun = time.monotonic()
    program = executor.compiled(batch)
    seconds = time.monotonic() - begun
    instructions = program.as_text().count(" = ")
    temporary = program.memory_analysis().temp_size_in_bytes
    output.data(
        f"compiled in {seconds:.1f} s to {instructions:,} instructions; besides weights and slots "
        f"a device needs {temporary / 1e9:.2f} GB"
    )
    return {
        "compile_seconds": round(seconds, 3),
        "instructions": instructions,
        "temporary_bytes_per_device": temporary,
    }


def _announce(output: Output, run: Run, target: int, begin: Path | None) -> None:
    import tensorflow as tf

    from gptj_convert import machine

    if run.step >= target:
        output.note(f"step {run.step} of {target} is reached: nothing to do")
        return
    verb = "going on after" if run.step else "beginning at"
    output.note(f"{run.model_dir}: {verb} step {run.step}, to step {target}")
    if run.executor.placement:
        output.note(run.executor.placement)
    if not run.continued and begin is None:
        output.note("weights begin at random: no checkpoint is named")
    feature = machine.HALF_PRECISION.get(run.params.dtype_policy.removeprefix("mixed_"))
    on_cpu = not _on_jax(run.params) and not tf.config.list_physical_devices("GPU")
    if feature and on_cpu and feature not in machine.cpu_features():
        output.note(f"warning: this processor lacks {feature}: 16 bits will be slower than 32")


def _warner(output: Output):
    return lambda text: output.note(f"warning: {text}")
