"""`gptj train`: start a training run, resume one, or evaluate its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.shared.command import command, parse_settings
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import (
    CHECKPOINT,
    COUNT,
    PATH,
    backend_option,
    eval_steps_option,
    execution_option,
    params_option,
    settings_option,
)
from runner.cli.shared.output import Output
from runner.cli.training.cs_launch import run_on_cs
from runner.cli.training.dry_run import plan_job
from runner.cli.training.job import Job
from runner.cli.training.options import (
    compile_only_option,
    cs_ip_option,
    max_steps_option,
    mode_option,
    model_dir_option,
    steps_option,
    validate_only_option,
)
from runner.cli.training.request import run_job
from runner.config.cs_target import Target

_HERE = ("--execution", "--backend", "--set", "--validate-only", "--compile-only")
_TRAINING = (
    *_HERE, "--init-from", "--checkpoint-path", "--adapter", "--max-steps", "--steps",
    "--epochs", "--eval-steps", "--workers", "--strict", "--dry-run",
)  # fmt: skip
_EVALUATION = (*_HERE, "--init-from", "--checkpoint-path", "--eval-steps")
_ON_CS = "a CS system (--cs-ip, --target)"


def _mode(values: Mapping[str, Any]) -> str:
    return _ON_CS if values["cs_ip"] or values["target"] else f"--mode {values['mode']}"


RULES = OptionRules(
    mode=_mode,
    takes={
        "--mode train": _TRAINING,
        "--mode train_and_eval": _TRAINING,
        "--mode eval": _EVALUATION,
        "--mode eval_all": _EVALUATION,
        _ON_CS: (
            "--cs-ip", "--target", "--run-py", "--init-from", "--checkpoint-path", "--max-steps",
            "--eval-steps", "--dry-run",
        ),
    },
    exclusive=(
        ("--init-from", "--checkpoint-path"),
        ("--max-steps", "--steps", "--epochs"),
        ("--dry-run", "--validate-only", "--compile-only"),
    ),
)  # fmt: skip


@command(
    "gptj train --init-from converted/",
    "gptj train --init-from converted/ --set model.lora.rank=8 --max-steps 500",
    "gptj train --params params.yaml --model-dir runs/a --dry-run",
    rules=RULES,
)
@click.option(
    "--init-from",
    type=CHECKPOINT,
    help="Checkpoint whose weights, optimizer state and step the run starts from.",
)
@click.option(
    "--checkpoint-path",
    type=CHECKPOINT,
    help="Checkpoint whose weights alone the run starts from, at step 0.",
)
@click.option(
    "--adapter",
    type=PATH,
    help="Folder of a LoRA adapter (peft format) to train further; needs model.lora.",
)
@params_option
@model_dir_option("--model-dir")
@mode_option("--mode", default="train")
@max_steps_option("--max-steps")
@steps_option("--steps")
@click.option(
    "--epochs",
    type=click.FloatRange(min=0, min_open=True),
    help="Train until the training records have been read N times, counted from the start of the "
    "run; N may be a fraction.",
)
@eval_steps_option
@execution_option
@backend_option
@settings_option
@click.option(
    "--workers",
    type=COUNT,
    help="Number of processes on this machine that share each batch.  "
    "[default: one per GPU if runconfig.enable_distributed, else 1]",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Fail on a damaged newest checkpoint instead of falling back to the one before.",
)
@validate_only_option("--validate-only")
@compile_only_option("--compile-only")
@cs_ip_option("--cs-ip")
@click.option(
    "--target",
    type=click.Choice([t.value for t in Target]),
    help="Client of the CS system: csx (cszoo), or legacy (the reference's run.py, releases 1.6 "
    "to 1.9).  [default: csx if --cs-ip is given]",
)
@click.option("--run-py", type=PATH, help="Path of the reference's run.py, for --target legacy.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the memory, disk and time of the run, or the command line of the CS client, then "
    "stop.",
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
    epochs: float | None,
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
    """Train from a checkpoint, or from random weights as a YAML describes them.

    A run whose folder has checkpoints resumes from the newest. Ctrl-C finishes the step, saves,
    and exits with 130; the same command resumes the run.
    """
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
    overridden = {
        "runconfig.eval_steps": eval_steps,
        "runconfig.execution": execution,
        "runconfig.backend": backend,
    }
    given = {key: value for key, value in overridden.items() if value is not None}
    job = Job(
        model_dir=model_dir,
        mode=mode,
        params_file=params_file,
        init_from=init_from,
        checkpoint_path=checkpoint_path,
        adapter=adapter,
        max_steps=max_steps,
        steps=steps,
        epochs=epochs,
        settings=parse_settings(settings) | given,
        strict=strict,
        workers=workers,
        only="validate" if validate_only else "compile" if compile_only else None,
    )
    return plan_job(output, job) if dry_run else run_job(output, job)
