"""Read back metrics and parameters of runs, and compare them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.formats.layouts.tf import read_best
from gptj_convert.settings.params_yaml import PARAMS_FILE, read_yaml
from gptj_model.errors import FileFault, UsageError
from runner.config.eval_metric import EVAL_PREFIX
from runner.reports.evaluations import read_evaluations
from runner.training.run.checkpoints import step_of
from runner.training.run.folder import METRICS_FILE, is_locked
from runner.training.run.starts import Start, read_starts

#: Prefixes of parameters that do not affect what is learned, such as length and place of a run.
_ASIDE = ("runconfig.", "csconfig.")
#: Number of last steps over which a run's loss is averaged.
_LAST = 10

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunHistory:
    """Metrics and parameters of one run."""

    name: str
    """Folder of the run, as it was given."""
    rows: Sequence[Row]
    """Rows of metrics.jsonl: those of steps have `loss`, those of evaluations `eval/…`."""
    params: Mapping[str, Any]
    """Values of params.yaml by dotted key."""
    evaluations: Sequence[Row] = ()
    """Evaluations of its checkpoints, by rising step: those of training, and of eval_all, which
    count where a step has both."""
    starts: Sequence[Start] = ()
    """Times that it was started or resumed."""
    best: Sequence[int] = ()
    """Steps of the checkpoints that best.json names, the best first."""
    is_running: bool = False
    """Whether a process trains it now."""

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return step and value of each row that has the key."""
        rows = self.evaluations if key.startswith(EVAL_PREFIX) else self.rows
        return [(row["step"], row[key]) for row in rows if key in row]

    @property
    def step(self) -> int:
        """Last step that was logged."""
        return self.rows[-1]["step"]

    @property
    def resumptions(self) -> Sequence[Start]:
        """Starts after the first."""
        return self.starts[1:]

    @property
    def skipped_steps(self) -> int | None:
        """Number of steps without an update, or None without a dynamic loss scale."""
        counts = [count for _, count in self.series("skipped_steps")]
        return int(counts[-1]) if counts else None

    @property
    def target(self) -> int | None:
        """Step that its last start trains to, or None."""
        return self.starts[-1].target if self.starts else None

    @property
    def loss(self) -> float | None:
        """Mean of the last ten losses, or None."""
        last = [loss for _, loss in self.series("loss")[-_LAST:]]
        return statistics.fmean(last) if last else None

    @property
    def eval_loss(self) -> float | None:
        """Smallest loss of all evaluations, or None."""
        return min((loss for _, loss in self.series("eval/loss")), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Median throughput; a mean would include the compilation of the first step."""
        rates = [rate for _, rate in self.series("tokens_per_second")]
        return statistics.median(rates) if rates else None


def read_run(model_dir: Path) -> RunHistory:
    """Read metrics and parameters of a run, ignoring an incomplete last line.

    Raises:
        UsageError: the folder has no metrics.
        FileFault: a line is not a JSON object with `step`.
        ConfigError: see `read_yaml`.
    """
    path = model_dir / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        hint = "name the folder of a run, its --model-dir"
        raise UsageError(f"{path}: not found, expected the metrics of a run", hint=hint) from None
    except UnicodeDecodeError as e:
        raise FileFault(f"{path}: is not UTF-8 at byte {e.start}") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({k: v for k, v in row.items() if _is_number(v)})
            int(rows[-1]["step"])
        except (ValueError, KeyError, AttributeError):
            del rows[number - 1 :]
            if number < len(lines):
                raise FileFault(
                    f"{path}: line {number} is {line[:60]!r}, expected a JSON object with `step`"
                ) from None
    if not rows:
        raise UsageError(f"{path}: is empty, expected at least one logged step")
    params = model_dir / PARAMS_FILE
    values = read_yaml(params) if params.is_file() else {}
    evaluated = {
        int(row["step"]): row
        for row in (*rows, *read_evaluations(model_dir))
        if any(key.startswith(EVAL_PREFIX) for key in row)
    }
    return RunHistory(
        name=str(model_dir),
        rows=rows,
        params=_flat(values),
        evaluations=[evaluated[step] for step in sorted(evaluated)],
        starts=read_starts(model_dir),
        best=[step_of(name) for name in read_best(model_dir)],
        is_running=is_locked(model_dir),
    )


def differences(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """Return the parameters that differ, each with one value per run, None where it is unset."""
    keys = dict.fromkeys(k for run in runs for k in run.params if not k.startswith(_ASIDE))
    found = {key: [run.params.get(key) for run in runs] for key in keys}
    return {k: v for k, v in found.items() if any(value != v[0] for value in v)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for name, inner in pairs:
        path = f"{key}[{name}]" if isinstance(value, list) else f"{key}.{name}".lstrip(".")
        if isinstance(inner, dict | list):
            found |= _flat(inner, path)
        else:
            found[path] = inner
    return found
