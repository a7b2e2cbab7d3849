"""The TensorFlow layout: a name-based bundle, `tf_model.ckpt` or `model.ckpt-N` of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from gptj_convert.formats.containers.layout import Layout
from gptj_convert.formats.containers.tensor_bundle import bundle_layout
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo

CONVERTED_PREFIX = "tf_model.ckpt"
#: Prefix of a run's checkpoints `model.ckpt-N`, where N is the step.
RUN_PREFIX = "model.ckpt"
#: File in which TensorFlow's estimators name the newest checkpoint of a run.
STATE_FILE = "checkpoint"
_INDEX = ".index"


def find_bundle(path: Path) -> Path | None:
    """Return the prefix of the bundle at `path`, or in it if it is a folder; None if there is none.

    In a folder, `tf_model.ckpt` comes first, then the newest checkpoint that the state file names.

    Args:
        path: prefix of a bundle, its index, or a folder.

    Raises:
        FileFault: the state file names a checkpoint that does not exist.
    """
    if path.name.endswith(_INDEX) and path.is_file():
        return path.with_name(path.name.removesuffix(_INDEX))
    if path.name and path.with_name(path.name + _INDEX).is_file():
        return path
    if (path / (CONVERTED_PREFIX + _INDEX)).is_file():
        return path / CONVERTED_PREFIX
    named = read_state(path)
    if not named:
        return None
    prefix = path / named[-1]
    if not prefix.with_name(prefix.name + _INDEX).is_file():
        raise FileFault(f"{path / STATE_FILE}: names {named[-1]}, which is not in that folder")
    return prefix


def read_state(folder: Path) -> list[str]:
    """Return the names of the checkpoints in a run's state file, the newest last."""
    try:
        text = (folder / STATE_FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    newest = re.findall(r'^model_checkpoint_path: "([^"]+)"', text, re.MULTILINE)
    every = re.findall(r'^all_model_checkpoint_paths: "([^"]+)"', text, re.MULTILINE)
    # The reference may write absolute paths of the machine it ran on, so only the names are used.
    names = [Path(p).name for p in every if p not in newest] + [Path(p).name for p in newest]
    return list(dict.fromkeys(names))


def state_text(names: list[str]) -> str:
    """Return the content of a state file that lists these checkpoints, the newest last."""
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    return "\n".join(lines) + "\n"


def tf_layout(tensors: Mapping[str, TensorInfo]) -> Layout:
    """Return the layout of the bundle in a folder of converted weights."""
    return bundle_layout(CONVERTED_PREFIX, tensors)
