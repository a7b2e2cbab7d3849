"""`gptj train`: train on from a checkpoint, or go on with a run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.command import PATH, command, parse_settings
from runner.cli.errors import Exit
from runner.cli.model_choice import DEFAULT_MODEL_DIR
from runner.cli.output import Output

if TYPE_CHECKING:
    from runner.params import Params
    from runner.train import Event, Run

MODES = ("train", "eval", "eval_all", "train_and_eval")


@command
@click.option("--init-from", type=PATH, help="Weights to begin with.")
@click.option("--params", "params_file", type=PATH, help="YAML.  [default: beside the weights]")
@click.option("--model-dir", type=PATH, default=DEFAULT_MODEL_DIR, show_default=True)
@click.option("--mode", type=click.Choice(MODES), default="train", show_default=True)
@click.option("--max-steps", type=click.IntRange(min=0), help="Train up to this step.")
@click.option("--steps", type=click.IntRange(min=0), help="Train so many steps more.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A YAML value.")
@click.option("--strict", is_flag=True, help="A damaged newest checkpoint is an error.")
def train(
    output: Output,
    init_from: Path | None,
    params_file: Path | None,
    model_dir: Path,
    mode: str,
    max_steps: int | None,
    steps: int | None,
    settings: tuple[str, ...],
    strict: bool,
) -> dict[str, Any]:
    """Train on from a checkpoint; a run whose folder has checkpoints goes on from the newest.

    Ctrl-C finishes the step, saves, and exits with 130; the same command goes on.
    """
    if max_steps is not None and steps is not None:
        raise click.UsageError("--max-steps and --steps exclude each other")
    from runner.cli import tensorflow

    tensorflow.prepare()
    from gptj_convert.reference_yaml import PARAMS_FILE
    from runner import train as training
    from runner.data.records import find_records

    parsed = parse_settings(settings)
    params = _params(init_from, params_file, model_dir, parsed)
    runconfig = params.runconfig
    if init_from is None and runconfig.checkpoint_path:
        init_from = Path(runconfig.checkpoint_path)
    if mode in ("eval", "eval_all"):
        return _evaluate(output, params, model_dir, init_from, every=mode == "eval_all")

    find_records(params.train_input.data_dir)  # before the model is loaded
    stop = _StopSignals()
    with training.locked(model_dir), stop:
        run = training.Run(
            params, model_dir, init_from=init_from, strict=strict, warn=_warner(output)
        )
        (model_dir / PARAMS_FILE).write_text(params.to_yaml(), encoding="utf-8")
        if init_from and run.continued:
            output.note(f"note: {model_dir} has checkpoints, so --init-from is not read")
        extra = steps if steps is not None else runconfig.steps if max_steps is None else None
        target = run.step + extra if extra is not None else max_steps
        target = runconfig.max_steps if target is None else target
        _announce(output, run, target)
        for event in training.train(
            run, target, stopped=stop.asked, evaluate=mode == "train_and_eval"
        ):
            _show(output, event, target)
    if stop.code is not None:
        output.note(f"stopped after step {run.step}, which is saved; the same command goes on")
    fields = {"output": str(model_dir), "step": run.step}
    return fields | {"exit": stop.code if stop.code is not None else Exit.OK}


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


def _params(
    init_from: Path | None, params_file: Path | None, model_dir: Path, settings: dict[str, Any]
) -> Params:
    """Parameters of the run: those it was begun with, unless a file is named."""
    from gptj_convert.checkpoint import open_checkpoint
    from gptj_convert.reference_yaml import PARAMS_FILE
    from gptj_model.errors import ConfigError
    from runner import checkpoints
    from runner.cli.model_choice import params_for
    from runner.params import load_params
    from runner.train import accept_changes

    saved = model_dir / PARAMS_FILE
    if checkpoints.steps(model_dir) and saved.is_file():
        before = load_params(saved)
        params = load_params(params_file or saved, settings)
        accept_changes(params, before, settings)
        return params
    if params_file:
        return load_params(params_file, settings)
    if init_from is None:
        raise ConfigError(
            f"{model_dir}: holds no run to go on with",
            hint="begin one: `gptj train --init-from converted/`",
        )
    with open_checkpoint(init_from) as checkpoint:
        return params_for(init_from, None, settings, checkpoint.config)


def _evaluate(
    output: Output, params: Params, model_dir: Path, init_from: Path | None, *, every: bool
) -> dict[str, Any]:
    from runner import checkpoints
    from runner.cli.eval import evaluate_model

    steps = checkpoints.steps(model_dir)
    if not steps and init_from:
        return {"metrics": evaluate_model(output, init_from, params)}
    if not steps:
        raise click.UsageError(f"{model_dir} holds no checkpoint to evaluate")
    metrics = {}
    for step in steps if every else steps[-1:]:
        prefix = checkpoints.prefix(model_dir, step)
        metrics = evaluate_model(output, prefix, params) | {"global_step": step}
    return {"metrics": metrics}


def _announce(output: Output, run: Run, target: int) -> None:
    if run.step >= target:
        output.note(f"step {run.step} of {target} is reached: nothing to do")
    else:
        verb = "going on after" if run.step else "beginning at"
        output.note(f"{run.model_dir}: {verb} step {run.step}, to step {target}")


def _warner(output: Output):
    return lambda text: output.note(f"warning: {text}")


def _show(output: Output, event: Event, target: int) -> None:
    from runner.cli.eval import metrics_line
    from runner.train import Evaluated, Saved, StepDone

    match event:
        case StepDone():
            output.note(
                f"step {event.step:>6}/{target}  loss {event.loss:.4f}  "
                f"lr {event.learning_rate:.3g}  grad norm {event.unclipped_grad_norm:.3g}  "
                f"{event.tokens_per_second:,.0f} tokens/s"
            )
        case Saved():
            output.note(f"saved {event.path}")
        case Evaluated():
            output.data(metrics_line(event.metrics | {"global_step": event.step}))
        case _:
            output.note(f"warning: {event.text}")
