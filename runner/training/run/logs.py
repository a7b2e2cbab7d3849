"""Logs of a run: metrics.jsonl and TensorBoard events, with no step twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runner.config.eval_metric import EvalMetric
from runner.config.params import Params
from runner.training.run.event_file import EventFile
from runner.training.run.events import Evaluated, StepDone
from runner.training.run.folder import METRICS_FILE


class Logs:
    """Logs of one run, continued after a step.

    Args:
        model_dir: folder of the run.
        step: last step to keep; an interrupted run had logged beyond its checkpoint.
        params: parameters that say how often to log.
    """

    def __init__(self, model_dir: Path, step: int, params: Params) -> None:
        self._params = params
        self._path = model_dir / METRICS_FILE
        _keep_lines(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = EventFile(model_dir)

    def step(self, event: StepDone) -> None:
        """Log one step."""
        line: dict[str, Any] = {
            "step": event.step,
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "unclipped_grad_norm": event.unclipped_grad_norm,
        }
        summaries = {
            "loss": event.loss,
            "train/lm_cost": event.loss,
            "train/lm_perplexity": math.exp(min(event.loss, 80.0)),
            "train/lm_bpb": event.loss / math.log(2) * self._params.tokens_per_byte,
            "train/lr": event.learning_rate,
            "train/unclipped_grad_norm": event.unclipped_grad_norm,
        }
        if event.loss_scale is not None:
            line |= {"loss_scale": event.loss_scale, "skipped_steps": event.skipped}
            summaries["train/loss_scale"] = event.loss_scale
        self._line(line | {k: _rounded(v) for k, v in event.resources.items() if v is not None})
        if event.step % self._params.runconfig.save_summary_steps == 0:
            self._summaries(event.step, summaries)

    def histograms(self, step: int, weights: Mapping[str, Any]) -> None:
        """Log the distribution of every weight."""
        for name, value in weights.items():
            self._events.histogram(name, np.asarray(value), step)

    def evaluation(self, event: Evaluated) -> None:
        """Log the metrics of an evaluation."""
        # The `loss` of a row is the training loss of its step; an evaluation has only eval/ keys.
        metrics = {EvalMetric(key).row_key: value for key, value in event.metrics.items()}
        self._line({"step": event.step, **metrics})
        self._summaries(event.step, metrics)

    def flush(self) -> None:
        """Return once every line is on the device."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def _summaries(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._events.scalar(tag, value, step)


class NoLogs:
    """Logs of a worker that is not the first, which writes nothing."""

    def step(self, event: StepDone) -> None:
        """Do nothing."""

    def histograms(self, step: int, weights: Mapping[str, Any]) -> None:
        """Do nothing."""

    def evaluation(self, event: Evaluated) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _keep_lines(path: Path, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint that it resumes from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break  # the line that was cut short
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.rename(path)
