"""A model's configuration from any file that may state one: config.json, the reference's
params.yaml or a YAML of the CS client, recognized by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptj_convert.settings import params_yaml, trainer_yaml
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError


def config_from_file(path: Path) -> GPTJConfig:
    """Return the config that a file states, whatever the file is called.

    Raises:
        ConfigError: the file cannot be read, is of another kind, or describes no GPT-J.
    """
    if _is_json(path):
        return GPTJConfig.from_file(path)
    values = params_yaml.read_yaml(path)
    if trainer_yaml.is_clients(values):
        return trainer_yaml.config_from_trainer(values, where=str(path))
    if isinstance(values.get("model"), dict):
        return params_yaml.config_from_params(values, where=str(path))
    raise ConfigError(
        f"{path}: has the keys {_some(values)}, expected config.json of Hugging Face, or a YAML "
        "with a section `model` or `trainer`"
    )


def _is_json(path: Path) -> bool:
    """Return whether the file starts as a JSON object does, or is named as one."""
    try:
        with path.open("rb") as f:
            return path.suffix == ".json" or f.read(64).lstrip()[:1] == b"{"
    except OSError:
        return True  # its reader says why it cannot be read


def _some(values: dict[str, Any]) -> str:
    names = [str(key) for key in values]
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "") or "none"
