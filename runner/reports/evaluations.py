"""evaluations.jsonl: metrics of a run's checkpoints that were evaluated on their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptj_convert.files.json_lines import append_line, read_lines
from runner.config.eval_metric import EvalMetric

EVALUATIONS_FILE = "evaluations.jsonl"


def record_evaluation(model_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Append the metrics of a checkpoint to the file of its run, under the keys of metrics.jsonl.

    Raises:
        OSError: the folder is not writable.
    """
    row = {"step": step} | {EvalMetric(key).row_key: value for key, value in metrics.items()}
    append_line(model_dir / EVALUATIONS_FILE, row)


def read_evaluations(model_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of the file, the newest of each step; lines that were cut are left out."""
    found: dict[int, dict[str, Any]] = {}
    for row in read_lines(model_dir / EVALUATIONS_FILE):
        try:
            found[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [found[step] for step in sorted(found)]
