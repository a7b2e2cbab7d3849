"""`gptj verify`: prove that a converted checkpoint is its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_convert.options import DEFAULT_OUT, LEVELS
from runner.cli.command import PATH, command, note_memory
from runner.cli.errors import Exit
from runner.cli.output import Output
from runner.cli.progress import progress

if TYPE_CHECKING:
    from gptj_convert.verify import Verdict

DEFAULT_CONVERTED = DEFAULT_OUT["tf"]


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
    type=click.Choice(LEVELS),
    default=LEVELS[-1],
    show_default=True,
    help="The last to run.",
)
@click.option("--config", "config_file", type=PATH, help="config.json, if a side has none.")
def verify(
    output: Output,
    converted: Path,
    against: Path | None,
    tolerance: float | None,
    level: str,
    config_file: Path | None,
) -> dict[str, Any]:
    """Compare a converted checkpoint with its source; exit 3 if they differ.

    Levels: structure (names, shapes, config), weights (every tensor, bit for bit), logits
    (hidden states and logits against Hugging Face's model, block by block).
    """
    from golden import tolerances
    from gptj_convert.verify import Verdict, source_of
    from gptj_convert.verify import verify as run

    if level == "logits":
        from runner.cli import tensorflow

        tensorflow.prepare(deterministic=False)
    against = against or source_of(converted)
    verdict = Verdict(tolerance=tolerance or tolerances.LOGITS)
    output.note(f"{converted} against {against}")
    with progress(output, "verifying", in_bytes=False) as report:
        for event in run(converted, against, verdict, level=level, config_file=config_file):
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
        output.data(f"{name:<10} {'ok' if result.ok else 'DIFFERS'}  {_summary(result.figures)}")
    for row in verdict.levels["logits"].figures["prompts"] if "logits" in verdict.levels else ():
        output.data(
            f"  {row['name']:<24} {row['tokens']:>4} tokens  max|Δ| {row['max_abs']:.1e}  "
            f"/σ {row['relative']:.1e}  KL {row['max_kl']:.1e}  top-1 {100 * row['top1']:.1f} %"
        )
    first = verdict.first_difference
    if first is None:
        output.data("MATCH")
        return
    output.data(f"MISMATCH in {first.place}")
    output.data(f"  found:    {first.found}")
    output.data(f"  expected: {first.expected}")
    if len(verdict.differences) > 1:
        output.data(f"  and {len(verdict.differences) - 1} more")
    output.note("hint: convert the source again, to another folder, and verify that")


def _summary(figures: dict[str, Any]) -> str:
    shown = {k: v for k, v in figures.items() if not isinstance(v, list)}
    return ", ".join(
        f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in shown.items()
    )
