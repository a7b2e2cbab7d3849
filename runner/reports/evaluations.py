"""evaluations.jsonl: metrics of a run's checkpoints that were evaluated on their own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.config.eval_metric import EvalMetric

EVALUATIONS_FILE = "evaluations.jsonl"


def record_evaluation(model_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Append the metrics of a checkpoint to the file of its run, under the keys of metrics.jsonl.

    Raises:
        OSError: the folder is not writable.
    """
    row = {"step": step} | {EvalMetric(key).row_key: value for key, value in metrics.items()}
    with (model_dir / EVALUATIONS_FILE).open("a", encoding="utf-8") as f:
        f.write(json.dumps(row) + "\n")
        f.flush()
        os.fsync(f.fileno())


def read_evaluations(model_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of the file, the newest of each step; lines that were cut are left out."""
    path = model_dir / EVALUATIONS_FILE
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            found[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [found[step] for step in sorted(found)]
