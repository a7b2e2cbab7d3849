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
from runner.cli.shared.command import command, parse_settings
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import CHECKPOINT, PATH, settings_option
from runner.cli.shared.output import Output
from runner.cli.training.cs_launch import run_on_cs
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

_ON_CS = "a CS system (--cs_ip)"
_PYTORCH = (
    "is the device of the CS PyTorch client's run.py; this is the TensorFlow reference's: leave it "
    "out, or run that client with `gptj train --target csx`"
)
_EVALUATION = (
    "--checkpoint_path", "--eval_steps", "--validate_only", "--compile_only", "--device", "--set",
)  # fmt: skip
_TRAINING = (*_EVALUATION, "--max_steps", "--steps")
RULES = OptionRules(
    mode=lambda values: _ON_CS if values["cs_ip"] else f"--mode {values['mode']}",
    takes={
        "--mode train": _TRAINING,
        "--mode train_and_eval": _TRAINING,
        "--mode eval": _EVALUATION,
        "--mode eval_all": _EVALUATION,
        _ON_CS: ("--cs_ip", "--checkpoint_path", "--max_steps", "--eval_steps"),
    },
    exclusive=(("--validate_only", "--compile_only"), ("--max_steps", "--steps")),
)


@command(
    "python -m runner.run --mode train --params params.yaml --model_dir model_dir",
    "python -m runner.run --mode eval --params params.yaml --model_dir model_dir --eval_steps 10",
    rules=RULES,
    strangers=dict.fromkeys(("CPU", "GPU", "CSX"), _PYTORCH),
)
@click.option(
    "--params",
    "-p",
    "params_file",
    type=PATH,
    required=True,
    metavar="FILE",
    help="Parameters in YAML.",
)
@model_dir_option("--model_dir", "-o")
@mode_option("--mode", "-m")
@cs_ip_option("--cs_ip")
@steps_option("--steps")
@max_steps_option("--max_steps")
@click.option("--eval_steps", type=int, help="Number of batches to evaluate; 0 means all.")
@validate_only_option("--validate_only")
@compile_only_option("--compile_only")
@click.option("--device", help="Device that computes, such as /gpu:0.")
@click.option(
    "--checkpoint_path", type=CHECKPOINT, help="Checkpoint to start from, or to evaluate."
)
@settings_option
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
    """Train or evaluate as the reference's run.py does, from its YAML and flags."""
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
