"""A run's folder: held by one process, its parameters kept, and changed only on purpose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptj_convert.lock_file import hold
from gptj_convert.whole_file import PARTIAL
from gptj_model.errors import ConfigError, TrainingFault
from runner.params import Params

LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"

#: Parameters that a continued run may change: how far and how often, not what is computed.
_FREE = ("runconfig", "eval_input", "model.recompute", "optimizer.log_hists")
#: Dropout masks are a worker's own.
_BOUND = ("runconfig.workers",)


@contextmanager
def locked(model_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this process; the kernel frees it when the process ends.

    Raises:
        TrainingFault: another process holds it.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    with (model_dir / LOCK_FILE).open("a+") as f:
        if holder := hold(f):
            raise TrainingFault(
                f"{model_dir}: another run is writing there (process {holder})",
                hint="wait for it, stop it, or name another --model-dir",
            )
        for left in model_dir.glob(f"{PARTIAL}*"):
            left.unlink()  # of a process that was killed
        yield


def accept_changes(params: Params, saved: Params, settings: Mapping[str, Any]) -> None:
    """Refuse parameters that would make a continued run another one, unless set explicitly.

    Raises:
        ConfigError: each such key, with the saved and the given value.
    """
    given, before = _flat(params.model_dump()), _flat(saved.model_dump())
    problems = [
        f"{key} was {before.get(key)!r}, now {given.get(key)!r}"
        for key in sorted(given.keys() | before.keys())
        if (key in _BOUND or not _is_under(key, _FREE))
        and given.get(key) != before.get(key)
        and not _is_under(key, settings)
    ]
    if problems:
        raise ConfigError(
            "the run was begun with other parameters: " + "; ".join(problems),
            hint="accept a change with `--set KEY=VALUE`, or name another --model-dir",
        )


def _is_under(key: str, sections: Iterable[str]) -> bool:
    return any(key == s or key.startswith(f"{s}.") for s in sections)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
