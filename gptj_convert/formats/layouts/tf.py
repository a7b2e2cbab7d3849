"""The TensorFlow layout: a name-based bundle, `tf_model.ckpt` or `model.ckpt-N` of a run."""

from __future__ import annotations

import json
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
#: File in which a run names its best checkpoints.
BEST_FILE = "best.json"
#: File in which a run keeps fingerprints of its records.
RECORDS_FILE = "records.json"
#: File in which a run keeps the templates that its records were made with.
TEMPLATES_FILE = "templates.json"
#: JSON files of a run that are no settings of its model.
RUN_FILES = (BEST_FILE, RECORDS_FILE, TEMPLATES_FILE)
_INDEX = ".index"
_BEST = "best"
_RUN_NAME = re.compile(rf"{re.escape(RUN_PREFIX)}-\d+")


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


def read_best(folder: Path) -> dict[str, dict[str, float]]:
    """Return a run's best checkpoints with their metric, the best first; none without a best.json.

    Raises:
        FileFault: best.json is damaged.
    """
    path = folder / BEST_FILE
    if not path.is_file():
        return {}
    try:
        stated = json.loads(path.read_bytes())
        key = stated["metric"]
        best = {str(e["checkpoint"]): {key: float(e[key])} for e in stated["checkpoints"]}
        if not all(_RUN_NAME.fullmatch(name) for name in best):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileFault(
            f"{path}: is not a list of checkpoints",
            hint="delete it: the run makes it again from metrics.jsonl when it resumes",
        ) from None
    return best


def best_text(metric: str, values: Mapping[str, float]) -> str:
    """Return the content of a best.json.

    Args:
        metric: key of the metric in metrics.jsonl.
        values: value of the metric by the name of the checkpoint, the best first.
    """
    entries = [{"checkpoint": name, metric: value} for name, value in values.items()]
    return json.dumps({"metric": metric, "checkpoints": entries}, indent=2) + "\n"


def find_named(path: Path) -> Path:
    """Return the prefix that `RUN@best` or `RUN@STEP` names; any other path is returned as it is.

    Raises:
        FileFault: the run has no such checkpoint.
    """
    folder, at, which = path.name.rpartition("@")
    run = path.with_name(folder) if at and folder else path
    if not at or path.exists() or not run.is_dir():
        return path
    if which == _BEST:
        if not (names := read_best(run)):
            raise FileFault(
                f"{run}: has no {BEST_FILE}, so none of its checkpoints is the best",
                hint="train with `--mode train_and_eval --set runconfig.keep_best=1`",
            )
        name = next(iter(names))
    elif which.isdecimal():
        name = f"{RUN_PREFIX}-{int(which)}"
    else:
        raise FileFault(f"{path}: {which!r} names no checkpoint, expected {run}@best or {run}@STEP")
    if not (run / (name + _INDEX)).is_file():
        found = sorted(p.name.removesuffix(_INDEX) for p in run.glob(f"{RUN_PREFIX}-*{_INDEX}"))
        raise FileFault(f"{run / name}: not found; the run has {', '.join(found) or 'none'}")
    return run / name


def state_text(names: list[str]) -> str:
    """Return the content of a state file that lists these checkpoints, the newest last."""
    lines = [f'model_checkpoint_path: "{names[-1]}"']
    lines += [f'all_model_checkpoint_paths: "{name}"' for name in names]
    return "\n".join(lines) + "\n"


def tf_layout(tensors: Mapping[str, TensorInfo]) -> Layout:
    """Return the layout of the bundle in a folder of converted weights."""
    return bundle_layout(CONVERTED_PREFIX, tensors)
