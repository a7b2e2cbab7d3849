"""Costs of a training run, printed before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.cli.shared.fetching import with_local_records
from runner.cli.shared.output import Output
from runner.cli.training.parameters import accepted, config_of, params_of, target_of
from runner.cli.training.preflight import preflight, sections_of

if TYPE_CHECKING:
    from gptj_model.config import GPTJConfig
    from runner.cli.training.job import Job
    from runner.config.params import Params
    from runner.planning.training_cost import TrainingPlan


def plan_job(output: Output, job: Job) -> dict[str, Any]:
    """Print the costs of a run; nothing is loaded or written, except for a moment to measure
    rates."""
    params = accepted(job, params_of(job))
    config = config_of(job, params)
    target = None
    if job.epochs is not None:
        target = preflight(
            job, with_local_records(output, params, *sections_of(job, params))
        ).target
    return print_costs(output, job, params, config, target)


def print_costs(
    output: Output, job: Job, params: Params, config: GPTJConfig, target: int | None = None
) -> dict[str, Any]:
    """Print memory, disk and time of a run, and return them as fields of the JSON object.

    Args:
        output: where they are printed.
        job: job of the command line.
        params: accepted parameters.
        config: configuration of the model.
        target: step to train to; None takes that of the job.
    """
    from gptj_convert.resources import machine
    from gptj_convert.resources.rates import measure

    plan, missing = _plan(job, params, config, target)
    here = _existing(job.model_dir)
    rates = measure(here)
    seconds, free = plan.seconds(rates), machine.disk_free(here)
    available = machine.memory_available()
    output.data(f"execution  {plan.execution}")
    output.data(f"memory     {plan.memory / 1e9:.2f} GB, {available / 1e9:.1f} GB available")
    output.data(
        f"disk       {plan.disk / 1e9:.2f} GB: {plan.states} × {plan.state / 1e9:.2f} GB of "
        f"checkpoints, {plan.scratch / 1e9:.2f} GB during a step; {free / 1e9:.1f} GB free"
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


def refuse_a_full_disk(job: Job, params: Params, config: GPTJConfig, target: int) -> None:
    """Refuse a run that will fill the disk, before hours of work rather than after.

    Raises:
        FileFault: the disk lacks space for what the run keeps there.
    """
    from gptj_convert.resources import machine
    from gptj_model.errors import FileFault

    plan, needed = _plan(job, params, config, target)
    if needed > (free := machine.disk_free(_existing(job.model_dir))):
        fewer = "runconfig.keep_best=0" if params.runconfig.keep_best else ""
        fewer = fewer or "runconfig.keep_checkpoint_max=1"
        raise FileFault(
            f"{job.model_dir}: the run needs {needed / 1e9:.2f} GB of disk for {plan.states} "
            f"checkpoints and what a step keeps, {free / 1e9:.2f} GB are free",
            hint=f"name a --model-dir on another disk, or keep fewer with `--set {fewer}`",
        )


def _plan(
    job: Job, params: Params, config: GPTJConfig, target: int | None
) -> tuple[TrainingPlan, int]:
    """Return the costs of a run, and the bytes of disk that it still needs."""
    from runner.planning.training_cost import Span, plan_training
    from runner.training.run import checkpoints

    steps = checkpoints.steps(job.model_dir)
    step = steps[-1] if steps else 0
    end = target_of(job, params, step) if target is None else target
    plan = plan_training(config, params, Span(begin=step, end=end, existing=len(steps)))
    return plan, plan.missing_disk(len(steps))


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(p for p in (folder, *folder.resolve().parents) if p.is_dir())
