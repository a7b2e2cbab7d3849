"""Model and parameters that a command uses by default."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptj_convert.options import DEFAULT_OUT
from runner.config.execution import Execution

if TYPE_CHECKING:
    from gptj_model.config import GPTJConfig
    from runner.config.params import Params

DEFAULT_MODEL_DIR = Path("model_dir")
CONVERTED = DEFAULT_OUT["tf"]


def default_model() -> Path:
    """Return ./model_dir if it has checkpoints, else ./converted."""
    from runner.training.run import checkpoints

    return DEFAULT_MODEL_DIR if checkpoints.steps(DEFAULT_MODEL_DIR) else CONVERTED


def stated_execution(folder: Path) -> str:
    """Return how the params.yaml in a folder runs the model; resident if there is none."""
    from gptj_convert.settings.params_yaml import PARAMS_FILE
    from runner.config.params_file import load_params

    path = folder / PARAMS_FILE
    return load_params(path).runconfig.execution if path.is_file() else Execution.RESIDENT


def params_for(
    model: Path, params_file: Path | None, settings: dict[str, Any], config: GPTJConfig
) -> Params:
    """Return the named parameters, else those beside the model, else the defaults for its
    config."""
    from gptj_convert.settings.params_yaml import PARAMS_FILE
    from gptj_convert.settings.pretraining import continued_pretraining
    from runner.config.params_file import load_params, validate

    folder = model if model.is_dir() else model.parent
    beside = folder / PARAMS_FILE
    if params_file or beside.is_file():
        return load_params(params_file or beside, settings)
    return validate(continued_pretraining(config), settings, where=f"defaults for {model}")
