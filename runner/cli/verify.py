"""`gptj verify`: prove that a converted checkpoint is its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_convert.options import ALL_LEVELS, DEFAULT_LEVEL, DEFAULT_OUT, LEVELS, MODEL_LEVELS
from runner.cli.command import PATH, command, note_memory
from runner.cli.errors import Exit
from runner.cli.output import Output, one_line
from runner.cli.progress import progress

if TYPE_CHECKING:
    from gptj_convert.verdict import Verdict

DEFAULT_CONVERTED = DEFAULT_OUT["tf"]
#: Causes that are printed at most; --json has all.
_SHOWN = 12


@command
@click.argument("converted", type=PATH, default=DEFAULT_CONVERTED)
@click.option("--against", type=PATH, help="The original.  [default: what the manifest names]")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Largest |Δ| of logits over their standard deviation that passes.  [default: 1e-4]",
)
@click.option(
    "--level",
    type=click.Choice((*LEVELS, ALL_LEVELS)),
    default=DEFAULT_LEVEL,
    show_default=True,
    help="The last to run.",
)
@click.option("--keep-going", is_flag=True, help="Run later levels although one failed.")
@click.option("--config", "config_file", type=PATH, help="config.json, if a side has none.")
def verify(
    output: Output,
    converted: Path,
    against: Path | None,
    tolerance: float | None,
    level: str,
    keep_going: bool,
    config_file: Path | None,
) -> dict[str, Any]:
    """Compare a converted checkpoint with its source; exit 3 if they differ.

    Levels: structure (names, shapes, config), weights (every tensor, bit for bit), logits
    (hidden states and logits against Hugging Face's model, block by block).
    """
    from golden import tolerances
    from gptj_convert.verdict import Verdict
    from gptj_convert.verify import levels_up_to, source_of
    from gptj_convert.verify import verify as run

    if level in (*MODEL_LEVELS, ALL_LEVELS):
        from runner.cli import tensorflow

        tensorflow.prepare(deterministic=False)
    against = against or source_of(converted)
    verdict = Verdict(tolerance or tolerances.LOGITS, levels_up_to(level))
    output.note(f"{converted} against {against}")
    with progress(output, "verifying", in_bytes=False) as report:
        for event in run(
            converted, against, verdict, config_file=config_file, keep_going=keep_going
        ):
            report(event.done, event.total, event.what)
    _show(output, verdict)
    note_memory(output, verdict.planned_memory)
    return {
        "output": str(converted),
        **verdict.to_json(),
        "exit": Exit.OK if verdict.ok else Exit.MISMATCH,
    }


def _show(output: Output, verdict: Verdict) -> None:
    for name, result in verdict.levels.items():
        if "not_run" in result.figures:
            output.data(f"{name:<10} not run: {result.figures['not_run']}")
            continue
        output.data(f"{name:<10} {'ok' if result.ok else 'DIFFERS'}  {_summary(result.figures)}")
    figures = {name: result.figures for name, result in verdict.levels.items()}
    for row in figures.get("logits", {}).get("prompts", ()):
        output.data(
            f"  {row['name']:<24} {row['tokens']:>4} tokens  max|Δ| {row['max_abs']:.1e}  "
            f"/σ {row['relative']:.1e}  KL {row['max_kl']:.1e}  top-1 {100 * row['top1']:.1f} %"
        )
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
    output.note("hint: convert the source again, to another folder, and verify that")


def _summary(figures: dict[str, Any]) -> str:
    shown = {k: v for k, v in figures.items() if not isinstance(v, list | dict | None)}
    return ", ".join(
        f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in shown.items()
    )
