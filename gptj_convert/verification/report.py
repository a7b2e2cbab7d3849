"""A verification as one self-contained HTML page, to be read, printed and shown to others."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.files.html_page import write_page
from gptj_convert.options import LEVELS

TEMPLATE_FILE = "report.html.j2"

#: Width of the heat map in cells; further tokens share cells, which show their largest figure.
_CELLS = 160
#: Smallest number of cells per prompt, so that the shortest can be seen.
_LEAST_CELLS = 3
#: Number of shades below the tolerance, one per power of ten; the shade above it is the alarm.
_SHADES = 6
#: Number of requests of tasks in the table of the largest differences.
_REQUESTS = 50
#: Powers of ten of the histogram of divergences.
_DIVERGENCES = range(-16, 1)


@dataclass(frozen=True, slots=True)
class _Cell:
    x: int
    y: int
    shade: int
    """0 … `_SHADES` - 1, higher towards the tolerance; `_SHADES` beyond it."""
    title: str


@dataclass(frozen=True, slots=True)
class _Span:
    """Place of one prompt in the heat map, in cells."""

    name: str
    x: int
    width: int


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    count: int
    height: float
    """Height of the bar, between 0 and 1."""


def write_report(
    path: Path, fields: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write the page; it appears under its name when it is complete.

    Args:
        path: path of the page; an existing page is replaced.
        fields: output of `gptj verify --json`.
        facts: tables of names and values for the end of the page, by title.

    Raises:
        OSError: the page cannot be written.
    """
    logits = fields.get("levels", {}).get("logits", {})
    tasks = fields.get("levels", {}).get("tasks", {})
    prompts = [row for row in logits.get("prompts", ()) if row.get("hidden_by_token")]
    spans = list(_spans(prompts))
    values = {
        "fields": fields,
        "facts": facts,
        "levels": [(n, fields["levels"][n]) for n in LEVELS if n in fields["levels"]],
        "prompts": logits.get("prompts", ()),
        "spans": spans,
        "cells": list(_cells(prompts, spans, fields["tolerance"])),
        "blocks": len(prompts[0]["hidden_by_token"]) if prompts else 0,
        "width": spans[-1].x + spans[-1].width if spans else 0,
        "bars": _bars([kl for row in prompts for kl in row["kl_by_token"]]),
        "tensors": list(_tensors(fields["levels"])),
        "tasks": tasks,
        "requests": largest_differences(tasks.get("requests", ()), _REQUESTS),
        "shades": _SHADES,
    }
    write_page(path, "gptj_convert.verification", TEMPLATE_FILE, values)


def largest_differences(
    requests: Sequence[Mapping[str, Any]], count: int
) -> list[Mapping[str, Any]]:
    """Return the requests of level tasks whose tokens differ most, the worst first.

    Args:
        requests: `requests` of the level's figures.
        count: largest number of requests to return.
    """
    return heapq.nlargest(count, requests, key=lambda row: _number(row["relative"]))


def _spans(prompts: Sequence[Mapping[str, Any]]) -> Iterator[_Span]:
    total = sum(row["tokens"] for row in prompts)
    x = 0
    for row in prompts:
        width = max(min(row["tokens"], _LEAST_CELLS), round(_CELLS * row["tokens"] / total))
        width = min(width, row["tokens"])
        yield _Span(row["name"], x, width)
        x += width


def _cells(
    prompts: Sequence[Mapping[str, Any]], spans: Sequence[_Span], tolerance: float
) -> Iterator[_Cell]:
    for row, span in zip(prompts, spans, strict=True):
        for block, values in enumerate(row["hidden_by_token"]):
            for n in range(span.width):
                first, end = (len(values) * k // span.width for k in (n, n + 1))
                worst = max((_number(v) for v in values[first:end]), default=0.0)
                positions = row["positions"][first:end]
                at = f"{positions[0]}–{positions[-1]}" if len(positions) > 1 else f"{positions[0]}"
                title = f"{row['name']}, block {block}, position {at}: {worst:.2g}"
                yield _Cell(span.x + n, block, _shade(worst, tolerance), title)


def _number(value: float | str) -> float:
    """A figure of the JSON; what it had no number for is beyond every tolerance."""
    return value if isinstance(value, float | int) else math.inf


def _shade(value: float, tolerance: float) -> int:
    if not value <= tolerance:
        return _SHADES
    if value <= 0:
        return 0
    return max(0, _SHADES - 1 - math.floor(math.log10(tolerance / value)))


def _bars(divergences: Sequence[float | str]) -> list[_Bar]:
    """A histogram by powers of ten; the first bar also holds all that is smaller."""
    if not divergences:
        return []
    powers = [
        min(max(math.floor(math.log10(kl)), _DIVERGENCES[0]), _DIVERGENCES[-1])
        if (kl := abs(_number(value))) and math.isfinite(kl)
        else _DIVERGENCES[0 if kl == 0 else -1]
        for value in divergences
    ]
    counts = {power: powers.count(power) for power in _DIVERGENCES}
    highest = max(counts.values())
    return [_Bar(f"1e{power}", n, n / highest) for power, n in counts.items()]


def _tensors(levels: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each tensor: from level weights, and its gradient where that was compared."""
    gradients = {row["hf"]: row for row in levels.get("gradients", {}).get("tensors", ())}
    findings = {row["hf"]: row for row in levels.get("weights", {}).get("findings", ())}
    for row in levels.get("weights", {}).get("by_tensor", ()):
        hf = row["hf"]
        yield row | {
            "max_abs": findings.get(hf, {}).get("max_abs"),
            "diagnosis": findings.get(hf, {}).get("diagnosis"),
            "gradient": gradients.get(hf, {}).get("relative"),
        }
