"""A training run as a command line starts, shows and stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj_model.errors import ConfigError
from runner.cli.shared.errors import Exit
from runner.cli.shared.fetching import with_local_records
from runner.cli.shared.output import Output
from runner.cli.shared.stop_signals import StopSignals
from runner.cli.training.display import training_display
from runner.cli.training.dry_run import refuse_a_full_disk
from runner.cli.training.parameters import target_of, weights_to_begin_with
from runner.cli.training.preflight import TRAIN_INPUT, Preflight, preflight, say_facts, sections_of
from runner.config.execution import Backend

if TYPE_CHECKING:
    from runner.cli.training.job import Job
    from runner.config.params import Params
    from runner.training.devices.distribution import Workers
    from runner.training.train import Run


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that is ready for its next step."""

    run: Run
    target: int
    """Step to train to."""


def train_job(output: Output, job: Job, params: Params, workers: Workers) -> dict[str, Any]:
    """Train as far as asked for, or until a signal; return the fields of the JSON object."""
    from runner.training import train as training
    from runner.training.run.events import StoppedEarly

    stop = StopSignals()
    early = None
    with begun(output, job, params, workers, stop) as start:
        run = start.run
        with training_display(output, start.target, params.runconfig) as show:
            evaluate = job.mode == "train_and_eval"
            for event in training.train(run, start.target, stopped=stop.asked, evaluate=evaluate):
                show(event)
                early = event.reason if isinstance(event, StoppedEarly) else early
    if stop.code is not None:
        what = f"step {run.step} is saved" if run.step else "nothing was trained yet"
        output.note(f"stopped; {what}. Run the same command to resume")
    fields: dict[str, Any] = {"output": str(job.model_dir), "step": run.step}
    if early:
        fields["stopped_early"] = early
    if best := best_of(job.model_dir):
        fields["best"] = best
    return fields | {"exit": stop.code if stop.code is not None else Exit.OK}


@contextmanager
def begun(
    output: Output,
    job: Job,
    params: Params,
    workers: Workers,
    signals: AbstractContextManager[Any],
) -> Iterator[Begun]:
    """Check what a job needs, hold its folder, describe the run there, and yield it.

    Args:
        output: where notes go.
        job: job that trains.
        params: accepted parameters.
        workers: processes that train together.
        signals: context that is open from when the folder is held.

    Raises:
        GptjError: as `preflight` and `Run` raise it.
    """
    from gptj_convert.settings.params_yaml import PARAMS_FILE
    from runner.data.making.instruction.run_templates import keep_templates
    from runner.training import train as training
    from runner.training.run.folder import locked

    begin = weights_to_begin_with(job, params)
    local = with_local_records(output, params, *sections_of(job, params))
    facts = preflight(job, local, workers.count)
    with ExitStack() as stack:
        if not workers.index:
            stack.enter_context(locked(job.model_dir))
            refuse_a_full_disk(job, params, facts.config, facts.target)
        stack.enter_context(signals)
        if params.runconfig.device:
            stack.enter_context(_device(params.runconfig.device))
        run = training.Run(
            local,
            job.model_dir,
            init_from=begin,
            adapter=job.adapter,
            weights_only=job.init_from is None,
            strict=job.strict,
            workers=workers,
            warn=_warner(output),
        )
        stack.enter_context(run)
        if (begin or job.adapter) and run.continued:
            output.note(f"note: {job.model_dir} has checkpoints, so no other weights are read")
        target = target_of(job, params, run.step, run.place, facts.epochs[TRAIN_INPUT])
        ended = training.is_finished(run, target, evaluate=job.mode == "train_and_eval")
        if not workers.index and not (ended and (job.model_dir / PARAMS_FILE).exists()):
            _keep_description(job, params, run, target, facts)
            keep_templates(job.model_dir, local.train_input.data_dir)
        if not ended:
            _announce(output, job, run, target, facts)
        elif run.step >= target:
            output.note(f"step {run.step} of {target} is reached; nothing to do")
        yield Begun(run, target)


def best_of(model_dir: Path) -> dict[str, Any] | None:
    """Return path and metric of the best checkpoint of a run, None if it keeps none.

    Raises:
        FileFault: as `read_best` raises it.
    """
    from gptj_convert.formats.layouts.tf import read_best

    best = read_best(model_dir)
    if not best:
        return None
    name, metric = next(iter(best.items()))
    return {"checkpoint": str(model_dir / name), **metric}


def _keep_description(job: Job, params: Params, run: Run, target: int, facts: Preflight) -> None:
    """Write what the run is trained with into its folder: parameters, records, and this start."""
    from gptj_convert.files.whole_file import write_whole
    from gptj_convert.settings.params_yaml import PARAMS_FILE
    from runner.training.run.records_file import keep_fingerprints
    from runner.training.run.starts import Start, record_start

    if job.epochs is not None:  # so that the file alone trains the same number of steps
        runconfig = params.runconfig.model_copy(update={"max_steps": target})
        params = params.model_copy(update={"runconfig": runconfig})
    write_whole(job.model_dir / PARAMS_FILE, params.to_yaml())
    keep_fingerprints(job.model_dir, facts.fingerprints)
    epoch = facts.epochs[TRAIN_INPUT]
    record_start(
        job.model_dir,
        Start(
            step=run.step,
            target=target,
            skipped=run.skipped,
            epoch=run.place.epoch,
            record=run.place.record,
            records=epoch.records if epoch.exact else None,
            batch_size=params.train_input.batch_size,
            grad_accum_steps=params.optimizer.grad_accum_steps,
        ),
    )


def _device(name: str) -> AbstractContextManager[None]:
    """Return the scope in which TensorFlow computes on a device.

    Raises:
        ConfigError: TensorFlow does not have it.
    """
    import tensorflow as tf

    present = [device.name for device in tf.config.list_logical_devices()]
    specs = [tf.DeviceSpec.from_string(device) for device in present]
    try:
        asked = tf.DeviceSpec.from_string(name)
    except ValueError:
        asked = None
    place = asked and (asked.device_type, asked.device_index or 0)
    if place not in [(spec.device_type, spec.device_index) for spec in specs]:
        raise ConfigError(
            f"runconfig.device is {name!r}, and TensorFlow has {', '.join(present)}",
            hint="leave it out, and TensorFlow chooses; `gptj doctor` lists GPUs",
        )
    return tf.device(name)


def _announce(output: Output, job: Job, run: Run, target: int, facts: Preflight) -> None:
    from gptj_convert.resources import machine

    say_facts(output, replace(facts, step=run.step, place=run.place, target=target))
    verb = "resuming from" if run.step else "starting at"
    output.note(f"{run.model_dir}: {verb} step {run.step}, target {target}")
    if run.executor.placement:
        output.note(run.executor.placement)
    if not run.continued and weights_to_begin_with(job, run.params) is None:
        output.note("weights are initialized at random: no checkpoint is named")
    feature = machine.HALF_PRECISION.get(run.params.dtype_policy.removeprefix("mixed_"))
    if feature and _on_cpu(run.params.runconfig.backend) and feature not in machine.cpu_features():
        output.note(f"warning: this processor lacks {feature}: 16 bits will be slower than 32")


def _on_cpu(backend: Backend) -> bool:
    if backend == Backend.JAX:
        import jax

        return jax.default_backend() == "cpu"
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def _warner(output: Output) -> Callable[[str], None]:
    return lambda text: output.note(f"warning: {text}")
