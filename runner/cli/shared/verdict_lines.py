"""A verdict as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from runner.cli.shared.output import Output, one_line

if TYPE_CHECKING:
    from gptj_convert.verification.evidence.verdict import Verdict
    from gptj_convert.verification.self_test import SelfTest

#: Largest number of causes printed; --json has all.
_SHOWN = 12
#: Number of requests printed; --json has all.
_LISTED = 3


def say_verdict(output: Output, verdict: Verdict) -> None:
    """Print each level, the verdict, and what is known about the first difference."""
    for name, result in verdict.levels.items():
        if "not_run" in result.figures:
            output.data(f"{name:<10} not run: {result.figures['not_run']}")
            continue
        output.data(f"{name:<10} {'ok' if result.ok else 'DIFFERS'}  {_summary(result.figures)}")
    figures = {name: result.figures for name, result in verdict.levels.items()}
    _say_logits(output, figures.get("logits", {}))
    _say_tasks(output, figures.get("tasks", {}))
    for name in figures.get("weights", {}).get("zero", ()):
        output.note(f"note: {name} is all zero, and is not in the source")
    for names in figures.get("weights", {}).get("duplicates", ()):
        output.note(f"note: equal bit for bit, and not in the source: {', '.join(names)}")
    first = verdict.first_difference
    if first is None:
        output.data("MATCH" if verdict.ok else "NOT JUDGED")
        return
    output.data(f"MISMATCH in {first.place}")
    output.data(f"  found:    {first.found}")
    output.data(f"  expected: {first.expected}")
    if len(verdict.differences) > 1:
        output.data(f"  and {len(verdict.differences) - 1} more")
    for text in verdict.diagnosis[:_SHOWN]:
        output.data(f"diagnosis: {one_line(text)}")
    if len(verdict.diagnosis) > _SHOWN:
        output.data(f"and {len(verdict.diagnosis) - _SHOWN} more; --json has all")
    if first.level in ("structure", "weights"):
        output.note("hint: convert the source again, to another folder, and verify that")
    else:
        output.note(
            "hint: the weights are right, so the two models compute differently: is the config "
            "the original's, and gptj unchanged? --report FILE.html shows where"
        )


def _say_logits(output: Output, figures: Mapping[str, Any]) -> None:
    for row in figures.get("prompts", ()):
        output.data(
            f"  {row['name']:<24} {row['tokens']:>4} tokens  max|Δ| {_short(row['max_abs'])}  "
            f"/σ {_short(row['relative'])}  KL {_short(row['max_kl'])}  "
            f"top-1 {100 * row['top1']:.1f} %"
        )
    if floor := figures.get("noise_floor"):
        output.data(
            f"  noise floor: the original in float32 against itself in float64, /σ "
            f"{_short(floor['relative'])}; the converted model against that {_short(floor['ours'])}"
        )
    if figures.get("rounding") is not None:
        output.data(
            f"  rounding the weights to the converted dtype changes /σ "
            f"{_short(figures['rounding'])}, which is not judged"
        )


def _say_tasks(output: Output, figures: Mapping[str, Any]) -> None:
    for row in figures.get("tasks", ()):
        output.data(
            f"  {row['name']:<24} {row['requests']:>4} requests  max|Δ| {_short(row['max_abs'])}  "
            f"/σ {_short(row['relative'])}  answers that change {row['answers_changed']} of "
            f"{row['documents']:,}"
        )
    for task, metrics in figures.get("metrics", {}).items():
        for name, sides in metrics.items():
            output.data(
                f"  {task} {name}: {_digits(sides['found'])}, the original "
                f"{_digits(sides['expected'])}"
            )
    from gptj_convert.verification.report import largest_differences

    if rows := largest_differences(figures.get("requests", ()), _LISTED):
        output.data("  largest differences of a request's log-likelihood:")
    for row in rows:
        output.data(
            f"    {row['task']}, document {row['document']}, choice {row['choice']}: "
            f"{_digits(row['found'])}, the original {_digits(row['expected'])}, Δ "
            f"{_short(row['difference'])}"
        )


def _digits(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float | int) else value


def _short(value: float | str) -> str:
    return f"{value:.1e}" if isinstance(value, float | int) else value


def _summary(figures: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in figures.items() if not isinstance(v, list | dict | None)}
    return ", ".join(f"{k} {_figure(v)}" for k, v in shown.items())


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def say_self_test(output: Output, result: SelfTest) -> None:
    """Print one line per fault, and what the tolerance can tell."""
    for fault in result.planted:
        seen = "" if fault.margin > 1 else ": logits alone would not show it"
        output.data(
            f"{fault.caught_by or 'NOT CAUGHT':<10} {fault.what}\n"
            f"{'':<10}   logits /σ {fault.relative:.1e}, {fault.margin:.2g} × the tolerance{seen}"
        )
    caught = sum(fault.caught_by is not None for fault in result.planted)
    output.data(
        f"{caught} of {len(result.planted)} faults are caught; the sound checkpoint is at "
        f"{result.floor:.1e}, {result.tolerance / max(result.floor, 1e-12):.0f} times below the "
        f"tolerance of {result.tolerance:g}"
    )
