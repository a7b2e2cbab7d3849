"""Comparison of runs as one self-contained HTML page with curves, figures and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.files import html_page
from runner.config.eval_metric import EvalMetric
from runner.reports.run_history import RunHistory

TEMPLATE_FILE = "runs.html.j2"

#: Size of a chart in SVG units, and its largest number of points.
WIDTH, HEIGHT = 960, 300
_POINTS = WIDTH // 2
#: Charts: key of the curve in the metrics, title, and key of the dots or None.
_CHARTS = (
    ("loss", "Loss", EvalMetric.LOSS.row_key),
    (EvalMetric.ACCURACY.row_key, "Accuracy of the evaluations", EvalMetric.ACCURACY.row_key),
    ("learning_rate", "Learning rate", None),
    ("unclipped_grad_norm", "Norm of the gradients", None),
)

Series = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class _Tick:
    at: float
    label: str


@dataclass(frozen=True, slots=True)
class _Line:
    run: int
    points: str
    """Points of the curve in the syntax of SVG."""
    dots: Sequence[tuple[float, float]]
    best: tuple[float, float] | None
    """Dot of the best checkpoint."""
    resumptions: Sequence[float]
    """Where the run was resumed, along the axis of steps."""


@dataclass(frozen=True, slots=True)
class _Chart:
    title: str
    lines: Sequence[_Line]
    across: Sequence[_Tick]
    up: Sequence[_Tick]


def write_page(
    path: Path,
    runs: Sequence[RunHistory],
    differing: Mapping[str, Sequence[Any]],
    *,
    reload: int | None = None,
) -> None:
    """Write the page; it replaces an existing file once it is complete.

    Args:
        path: path of the page.
        runs: runs in the order of their colors.
        differing: parameters that differ, each with one value per run; see `differences`.
        reload: seconds after which an open page loads itself again; None never does.

    Raises:
        OSError: the page cannot be written.
    """
    values = {
        "runs": runs,
        "differing": differing,
        "charts": [chart for spec in _CHARTS if (chart := _chart(runs, *spec))],
        "width": WIDTH,
        "height": HEIGHT,
        "colors": 8,
        "reload": reload,
        "metrics": [metric.row_key for metric in EvalMetric],
    }
    html_page.write_page(path, "runner.reports", TEMPLATE_FILE, values, figure=figure)


def figure(value: Any) -> str:
    """Format a number for people; None becomes a dash."""
    if value is None:
        return "–"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 10_000 else f"{value:,.0f}"


def _chart(runs: Sequence[RunHistory], key: str, title: str, dots: str | None) -> _Chart | None:
    lines = [_drawable(run.series(key)) for run in runs]
    marks = [_drawable(run.series(dots)) if dots else [] for run in runs]
    points = [point for series in (*lines, *marks) for point in series]
    if not points:
        return None
    steps, values = zip(*points, strict=True)
    left, right = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = (point[0] - left) / (right - left) * WIDTH
        return round(x, 1), round(HEIGHT - (point[1] - low) / (high - low) * HEIGHT, 1)

    drawn = []
    for n, (series, marked) in enumerate(zip(lines, marks, strict=True)):
        text = " ".join(f"{x},{y}" for x, y in map(place, series))
        best = next((p for p in marked if runs[n].best[:1] == [p[0]]), None)
        resumed = [place((s.step, low))[0] for s in runs[n].resumptions if left <= s.step <= right]
        drawn.append(_Line(n, text, [place(p) for p in marked], best and place(best), resumed))
    across = [_Tick(place((t, low))[0], f"{t:,.0f}") for t in _ticks(left, right)]
    up = [_Tick(place((left, t))[1], f"{t:.4g}") for t in _ticks(low, high)]
    return _Chart(title, drawn, across, up)


def _drawable(series: Series) -> Series:
    """Return at most `_POINTS` points, each the mean of a group of successive points."""
    size = max(1, -(-len(series) // _POINTS))
    groups = [series[n : n + size] for n in range(0, len(series), size)]
    return [(g[-1][0], sum(value for _, value in g) / len(g)) for g in groups]


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield about five round numbers between two bounds."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw)
    n = math.ceil(low / step)
    while n * step <= high:
        yield n * step
        n += 1
