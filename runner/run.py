"""The reference's command line, `run.py`, on the engine of `gptj train`.

python -m runner.run --mode train --params params.yaml --model_dir model_dir
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the folder to import from is the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import rich_click as click

from runner.cli.root import main
from runner.cli.shared.command import PATH, command, parse_settings
from runner.cli.shared.model_choice import DEFAULT_MODEL_DIR
from runner.cli.shared.output import Output
from runner.cli.training.cs_launch import run_on_cs
from runner.cli.training.job import MODES, Job
from runner.cli.training.request import run_job
from runner.config.cs_target import Target


@command
@click.option("-p", "--params", "params_file", type=PATH, required=True, help="YAML.")
@click.option("-o", "--model_dir", type=PATH, default=DEFAULT_MODEL_DIR, show_default=True)
@click.option("-m", "--mode", type=click.Choice(MODES), required=True)
@click.option("--cs_ip", help="Address of a CS system.")
@click.option("--steps", type=click.IntRange(min=0), help="Train so many steps more.")
@click.option("--max_steps", type=click.IntRange(min=0), help="Train up to this step.")
@click.option("--eval_steps", type=int, help="Batches to evaluate; 0 means all.")
@click.option("--validate_only", is_flag=True, help="Check parameters, records and headers; stop.")
@click.option("--compile_only", is_flag=True, help="That, and compile the step; stop.")
@click.option("--device", help="Where to compute, such as /gpu:0.")
@click.option("--checkpoint_path", type=PATH, help="Weights to begin with, or to evaluate.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A YAML value.")
def run(
    output: Output,
    params_file: Path,
    model_dir: Path,
    mode: str,
    cs_ip: str | None,
    steps: int | None,
    max_steps: int | None,
    eval_steps: int | None,
    validate_only: bool,
    compile_only: bool,
    device: str | None,
    checkpoint_path: Path | None,
    settings: tuple[str, ...],
) -> dict[str, Any]:
    """Train or evaluate by the reference's YAML and flags."""
    if validate_only and compile_only:
        raise click.UsageError("--validate_only and --compile_only exclude each other")
    if cs_ip:
        from runner.cerebras import CsJob

        job = CsJob(
            target=Target.CSX,
            cs_ip=cs_ip,
            model_dir=model_dir,
            mode=mode,
            init_from=checkpoint_path,
            params_file=params_file,
            max_steps=max_steps,
            eval_steps=eval_steps,
        )
        return run_on_cs(output, job, dry_run=False)
    given = {"eval_steps": eval_steps, "device": device}
    changed = {f"runconfig.{k}": v for k, v in given.items() if v is not None}
    job = Job(
        model_dir=model_dir,
        mode=mode,
        params_file=params_file,
        checkpoint_path=checkpoint_path,
        max_steps=max_steps,
        steps=steps,
        settings=changed | parse_settings(settings),
        only="validate" if validate_only else "compile" if compile_only else None,
    )
    return run_job(output, job)


if __name__ == "__main__":
    sys.exit(main(command=run, name="run.py"))
