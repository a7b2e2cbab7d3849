"""Options that `gptj train` and the reference's command line spell differently and share."""

from __future__ import annotations

import rich_click as click

from runner.cli.shared.model_choice import DEFAULT_MODEL_DIR
from runner.cli.shared.options import COUNT_OR_ZERO, PATH, Decorator
from runner.cli.training.job import MODES


def model_dir_option(*names: str) -> Decorator:
    """Return the option that names the folder of the run."""
    return click.option(
        *names,
        type=PATH,
        default=DEFAULT_MODEL_DIR,
        show_default=True,
        help="Folder of the run: its checkpoints, metrics and logs.",
    )


def mode_option(*names: str, default: str | None = None) -> Decorator:
    """Return the option that chooses between training and evaluation; required without default."""
    return click.option(
        *names,
        type=click.Choice(MODES),
        required=default is None,
        default=default,
        show_default=default is not None,
        help="Train, evaluate the newest checkpoint, evaluate every checkpoint, or train and "
        "evaluate in turn.",
    )


def max_steps_option(name: str) -> Decorator:
    """Return the option that names the step to reach."""
    return click.option(name, type=COUNT_OR_ZERO, help="Train up to step N.")


def steps_option(name: str) -> Decorator:
    """Return the option that names the number of further steps."""
    return click.option(name, type=COUNT_OR_ZERO, help="Train N more steps.")


def validate_only_option(name: str) -> Decorator:
    """Return the option that stops before the model is built."""
    return click.option(
        name, is_flag=True, help="Check parameters, records and headers, then stop."
    )


def compile_only_option(name: str) -> Decorator:
    """Return the option that stops after the step is compiled."""
    return click.option(
        name,
        is_flag=True,
        help="Check parameters, records and headers, compile the step, then stop.",
    )


def cs_ip_option(name: str) -> Decorator:
    """Return the option that names a CS system."""
    return click.option(name, metavar="ADDRESS", help="Run on the CS system at this address.")
