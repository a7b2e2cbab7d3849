"""Costs of a training run, printed before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runner.cli.shared.output import Output
from runner.cli.training.parameters import accepted, config_of, params_of, target_of

if TYPE_CHECKING:
    from runner.cli.training.job import Job
    from runner.config.params import Params
    from runner.planning.training_cost import TrainingPlan


def plan_job(output: Output, job: Job) -> dict[str, Any]:
    """Print the costs of a run; nothing is loaded or written, except for a moment to measure
    rates."""
    from gptj_convert.resources import machine
    from gptj_convert.resources.rates import measure
    from runner.training.run import checkpoints

    params = accepted(job, params_of(job))
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


def refuse_a_full_disk(job: Job, params: Params) -> None:
    """Refuse a run that will fill the disk, before hours of work rather than after.

    Raises:
        FileFault: the disk lacks space for what the run keeps there.
    """
    from gptj_convert.resources import machine
    from gptj_model.errors import FileFault
    from runner.training.run import checkpoints

    plan = _plan(job, params)
    needed = plan.missing_disk(len(checkpoints.steps(job.model_dir)))
    if needed > (free := machine.disk_free(job.model_dir)):
        raise FileFault(
            f"{job.model_dir}: the run needs {needed / 1e9:.2f} GB of disk for {plan.states} "
            f"checkpoints and what a step keeps, {free / 1e9:.2f} GB are free",
            hint="name a --model-dir on another disk, or keep fewer with "
            "`--set runconfig.keep_checkpoint_max=1`",
        )


def _plan(job: Job, params: Params) -> TrainingPlan:
    from runner.planning.training_cost import Span, plan_training
    from runner.training.run import checkpoints

    steps = checkpoints.steps(job.model_dir)
    step = steps[-1] if steps else 0
    span = Span(begin=step, end=target_of(job, params, step), existing=len(steps))
    return plan_training(config_of(job, params), params, span)
