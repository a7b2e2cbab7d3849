"""`gptj train`: train on from a checkpoint or from nothing, or go on with a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.shared.command import PATH, command, parse_settings
from runner.cli.shared.model_choice import DEFAULT_MODEL_DIR
from runner.cli.shared.output import Output
from runner.cli.training.cs_launch import run_on_cs
from runner.cli.training.dry_run import plan_job
from runner.cli.training.job import MODES, Job
from runner.cli.training.request import run_job
from runner.config.cs_target import Target
from runner.config.execution import Backend, Execution


@command
@click.option("--init-from", type=PATH, help="Weights to begin with, and their step if any.")
@click.option("--checkpoint-path", type=PATH, help="Weights alone to begin with, at step 0.")
@click.option(
    "--adapter", type=PATH, help="Folder of a LoRA adapter (peft) to continue; needs model.lora."
)
@click.option("--params", "params_file", type=PATH, help="YAML.  [default: beside the weights]")
@click.option("--model-dir", type=PATH, default=DEFAULT_MODEL_DIR, show_default=True)
@click.option("--mode", type=click.Choice(MODES), default="train", show_default=True)
@click.option("--max-steps", type=click.IntRange(min=0), help="Train up to this step.")
@click.option("--steps", type=click.IntRange(min=0), help="Train so many steps more.")
@click.option("--eval-steps", type=click.IntRange(min=0), help="Batches to evaluate; 0 means all.")
@click.option(
    "--execution",
    type=click.Choice([str(way) for way in Execution]),
    help="Weights in memory, or on the disk and brought one block at a time.  [the YAML's]",
)
@click.option(
    "--backend",
    type=click.Choice([str(one) for one in Backend]),
    help="What computes: TensorFlow, or JAX, which divides a model among devices.  [the YAML's]",
)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A YAML value.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Train in so many processes of this machine, which share each batch.  "
    "[one a GPU if runconfig.enable_distributed]",
)
@click.option("--strict", is_flag=True, help="A damaged newest checkpoint is an error.")
@click.option("--validate-only", is_flag=True, help="Check parameters, records and headers; stop.")
@click.option("--compile-only", is_flag=True, help="That, and compile the step; stop.")
@click.option("--cs-ip", help="Run on the CS system at this address.")
@click.option(
    "--target",
    type=click.Choice([t.value for t in Target]),
    help="The CS system's client: cszoo, or the reference's program of releases 1.6 to 1.9.  "
    "[csx if an address is given]",
)
@click.option("--run-py", type=PATH, help="The reference's run.py, for --target legacy.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only say what memory, disk and time it takes; or what a CS system's client is called "
    "with.",
)
def train(
    output: Output,
    init_from: Path | None,
    checkpoint_path: Path | None,
    adapter: Path | None,
    params_file: Path | None,
    model_dir: Path,
    mode: str,
    max_steps: int | None,
    steps: int | None,
    eval_steps: int | None,
    execution: str | None,
    backend: str | None,
    settings: tuple[str, ...],
    workers: int | None,
    strict: bool,
    validate_only: bool,
    compile_only: bool,
    cs_ip: str | None,
    target: str | None,
    run_py: Path | None,
    dry_run: bool,
) -> dict[str, Any]:
    """Train on from a checkpoint, or from nothing but a YAML; a run whose folder has checkpoints
    goes on from the newest.

    Ctrl-C finishes the step, saves, and exits with 130; the same command goes on.
    """
    if validate_only and compile_only:
        raise click.UsageError("--validate-only and --compile-only exclude each other")
    if init_from and checkpoint_path:
        raise click.UsageError("--init-from and --checkpoint-path exclude each other")
    if adapter and (cs_ip or target):
        raise click.UsageError("--adapter is for training on this machine, not on a CS system")
    if cs_ip or target:
        from runner.cerebras import CsJob

        return run_on_cs(
            output,
            CsJob(
                target=Target(target or Target.CSX.value),
                cs_ip=cs_ip,
                model_dir=model_dir,
                mode=mode,
                init_from=init_from or checkpoint_path,
                params_file=params_file,
                max_steps=max_steps,
                eval_steps=eval_steps,
                run_py=run_py,
            ),
            dry_run=dry_run,
        )
    if run_py:
        raise click.UsageError("--run-py goes with --cs-ip or --target")
    if dry_run and (validate_only or compile_only):
        raise click.UsageError("--dry-run, --validate-only and --compile-only exclude each other")
    parsed = parse_settings(settings)
    if eval_steps is not None:
        parsed["runconfig.eval_steps"] = eval_steps
    if execution is not None:
        parsed["runconfig.execution"] = execution
    if backend is not None:
        parsed["runconfig.backend"] = backend
    job = Job(
        model_dir=model_dir,
        mode=mode,
        params_file=params_file,
        init_from=init_from,
        checkpoint_path=checkpoint_path,
        adapter=adapter,
        max_steps=max_steps,
        steps=steps,
        settings=parsed,
        strict=strict,
        workers=workers,
        only="validate" if validate_only else "compile" if compile_only else None,
    )
    return plan_job(output, job) if dry_run else run_job(output, job)
