"""A training or evaluation job, as `gptj train` and `runner.run` both run it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.output import Output
from runner.cli.training.job import Job
from runner.cli.training.parameters import accepted, checkpoints_to_evaluate, params_of
from runner.config.execution import Backend

if TYPE_CHECKING:
    from runner.config.params import Params
    from runner.training.devices.distribution import Cluster, Workers


def run_job(output: Output, job: Job) -> dict[str, Any]:
    """Run the job, and return the fields of the command's JSON object."""
    from runner.cli.shared import framework
    from runner.cli.training.launch import train_job
    from runner.cli.training.local_workers import run_workers
    from runner.cli.training.validate import rehearse
    from runner.training.devices.backend import check_backend
    from runner.training.devices.distribution import join

    params = params_of(job)
    check_backend(params)
    if job.only:
        return rehearse(output, job, accepted(job, params))
    if job.mode in ("eval", "eval_all"):
        framework.prepare(backend=params.runconfig.backend)
        return _evaluate(output, job, params)
    if params.runconfig.backend == Backend.JAX:
        return _train_on_jax(output, job, accepted(job, params, 1))
    cluster, count = _together(job, params)
    params = accepted(job, params, count)
    if count > 1 and cluster is None:
        raise click.exceptions.Exit(run_workers(count))
    framework.prepare(backend=params.runconfig.backend)
    workers = join(cluster, output.note)
    return train_job(_own_output(output, workers), job, params, workers)


def _train_on_jax(output: Output, job: Job, params: Params) -> dict[str, Any]:
    """Train in the processes that run this command, or in `job.workers` new ones."""
    from runner.cli.shared import framework
    from runner.cli.shared.errors import code_of
    from runner.cli.training.launch import train_job
    from runner.cli.training.local_workers import run_workers
    from runner.training.devices.distribution import (
        Alone,
        check_same_run,
        cluster_here,
        launcher_here,
    )

    cluster = cluster_here()
    if not cluster and (job.workers or 1) > 1:
        raise click.exceptions.Exit(run_workers(job.workers or 1))
    joins = bool(cluster or launcher_here() or params.runconfig.multiple_workers)
    framework.prepare(backend=Backend.JAX, joins_others=joins)
    from runner.training.devices.processes import ending_alone, join_processes

    if not joins:
        return train_job(output, job, params, Alone())
    workers = join_processes(cluster, output.note)
    with ending_alone(code_of):
        check_same_run(workers, params.to_yaml())
        return train_job(_own_output(output, workers), job, params, workers)


def _own_output(output: Output, workers: Workers) -> Output:
    """Return the output of this worker, of which the first one prints the progress."""
    if not workers.index:
        return output
    output.note(f"worker {workers.index} of {workers.count}: the first one prints the progress")
    return Output(json=output.json, quiet=True)


def _together(job: Job, params: Params) -> tuple[Cluster | None, int]:
    """Return the cluster, if its processes are already running, and the number of workers.

    Raises:
        ConfigError: the parameters ask for several machines, and nothing names them.
    """
    from gptj_model.errors import ConfigError
    from runner.cli.training.local_workers import visible_gpus
    from runner.training.devices.distribution import TF_CONFIG, cluster_here

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


def _evaluate(output: Output, job: Job, params: Params) -> dict[str, Any]:
    from runner.cli.evaluation.records import evaluate_model
    from runner.reports.evaluations import record_evaluation

    found: list[dict[str, Any]] = []
    for step, path in checkpoints_to_evaluate(job, params):
        if step is None:
            return {"metrics": evaluate_model(output, path, params)}
        metrics = evaluate_model(output, path, params, step=step)
        found.append({**metrics, "global_step": step})
        if job.mode == "eval_all":
            try:
                record_evaluation(job.model_dir, step, metrics)
            except OSError as e:
                output.note(f"note: {e.filename}: {e.strerror}; `gptj runs` will not show these")
    fields: dict[str, Any] = {"metrics": found[-1]}
    return fields | ({"evaluations": found} if job.mode == "eval_all" else {})
