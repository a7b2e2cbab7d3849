"""Evaluations of a run: which of its checkpoints are the best, and when it stops early.

Both are functions of the evaluations in metrics.jsonl, so a run that was killed resumes with the
choice that it would have made. best.json names the best checkpoints for whoever reads the folder,
and protects their files; it is written before a checkpoint that is no longer among them is deleted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.files.whole_file import write_whole
from gptj_convert.formats.layouts.tf import BEST_FILE, best_text, read_best
from runner.config.eval_metric import EVAL_PREFIX, EvalMetric
from runner.config.params import EarlyStopping, RunConfig
from runner.training.run import checkpoints
from runner.training.run.folder import METRICS_FILE


@dataclass(frozen=True, slots=True)
class Score:
    """Value of a metric at a step."""

    step: int
    value: float


class Selection:
    """Best checkpoints of a run, and its early stop.

    Args:
        model_dir: folder of the run.
        runconfig: settings of the run.
        step: step that the run resumes at; later evaluations are ignored.
    """

    def __init__(self, model_dir: Path, runconfig: RunConfig, step: int) -> None:
        self._model_dir = model_dir
        self._runconfig = runconfig
        rows = {row["step"]: row for row in (*_best(model_dir), *_evaluations(model_dir))}
        self._rows = [rows[at] for at in sorted(rows) if at <= step]

    def has(self, step: int) -> bool:
        """Return whether the checkpoint of a step was evaluated."""
        return any(row["step"] == step for row in self._rows)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation that metrics.jsonl has, too."""
        self._rows.append({"step": step, **{EvalMetric(k).row_key: v for k, v in metrics.items()}})

    def keep_best(self) -> None:
        """List the best checkpoints in best.json, then delete those that are neither among them
        nor among the newest.

        Raises:
            OSError: best.json cannot be written; no checkpoint is deleted.
        """
        if not (count := self._runconfig.keep_best):
            return
        metric = self._runconfig.best_metric
        existing = set(checkpoints.steps(self._model_dir))
        ranked = [s for s in ranking(self._scores(metric), metric) if s.step in existing]
        values = {checkpoints.prefix(Path(), s.step).name: s.value for s in ranked[:count]}
        text = best_text(metric.row_key, values)
        path = self._model_dir / BEST_FILE
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
        keep = self._runconfig.keep_checkpoint_max or 0
        checkpoints.retain(self._model_dir, keep=keep)

    @property
    def best(self) -> Score | None:
        """Best evaluation so far by `best_metric`, or None."""
        metric = self._runconfig.best_metric
        return next(iter(ranking(self._scores(metric), metric)), None)

    @property
    def stop(self) -> str | None:
        """Reason to stop early, or None."""
        rule = self._runconfig.early_stopping
        if not rule or (waited := self._without_improvement(rule)) < rule.patience:
            return None
        return (
            f"{rule.metric.row_key} has not improved by more than {rule.min_delta:g} in "
            f"{waited} evaluations"
        )

    def _without_improvement(self, rule: EarlyStopping) -> int:
        """Return the number of evaluations since the last that improved the metric."""
        best, waited = math.nan, 0
        for score in self._scores(rule.metric):
            gain = best - score.value if rule.metric.falls else score.value - best
            if math.isfinite(score.value) and (math.isnan(best) or gain > rule.min_delta):
                best, waited = score.value, 0
            else:
                waited += 1
        return waited

    def _scores(self, metric: EvalMetric) -> list[Score]:
        key = metric.row_key
        return [Score(row["step"], row[key]) for row in self._rows if key in row]


def ranking(scores: list[Score], metric: EvalMetric) -> list[Score]:
    """Return scores with the best first; of equal ones the earlier, and those that are not a
    number last."""

    def rank(score: Score) -> tuple[bool, float, int]:
        value = score.value if metric.falls else -score.value
        return math.isnan(value), value, score.step

    return sorted(scores, key=rank)


def _best(model_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the evaluations in best.json, which stand where metrics.jsonl was lost.

    Raises:
        FileFault: best.json is damaged.
    """
    for name, values in read_best(model_dir).items():
        yield {"step": checkpoints.step_of(name), **values}


def _evaluations(model_dir: Path) -> list[dict[str, Any]]:
    """Return the evaluations in metrics.jsonl, up to a line that a kill has cut."""
    path = model_dir / METRICS_FILE
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            evaluated = any(key.startswith(EVAL_PREFIX) for key in row) and int(row["step"]) >= 0
        except (ValueError, KeyError, TypeError, AttributeError):
            break
        if evaluated:
            found.append(row)
    return found
