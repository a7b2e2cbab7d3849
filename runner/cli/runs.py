"""`gptj runs`: compare training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.shared.command import command
from runner.cli.shared.options import PATH, html_option
from runner.cli.shared.output import Output


@command("gptj runs model_dir", "gptj runs runs/a runs/b --html runs.html")
@click.argument("model_dirs", type=PATH, nargs=-1, required=True, metavar="MODEL_DIR...")
@html_option("the curves of loss and learning rate")
def runs(output: Output, model_dirs: tuple[Path, ...], html: Path | None) -> dict[str, Any]:
    """Compare runs: their steps, losses and rates, and the parameters that differ.

    Reads metrics.jsonl and params.yaml in each folder; a run may still be training.
    """
    from runner.reports.run_history import differences, read_run
    from runner.reports.runs_page import figure, write_page

    found = [read_run(folder) for folder in model_dirs]
    differing = differences(found)
    fields = [
        {
            "model_dir": run.name,
            "step": run.step,
            "loss": run.loss,
            "eval_loss": run.eval_loss,
            "tokens_per_second": run.tokens_per_second,
        }
        for run in found
    ]
    header = ["run", "step", "loss", "eval loss", "tokens/s"]
    rows = [[str(f["model_dir"]), *map(figure, list(f.values())[1:])] for f in fields]
    for line in _aligned([header, *rows]):
        output.data(line)
    for key, values in differing.items():
        output.data(f"{key}: " + ", ".join("–" if v is None else str(v) for v in values))
    if html:
        write_page(html, found, differing)
        output.note(f"wrote {html}")
    return {"runs": fields, "differences": differing} | ({"html": str(html)} if html else {})


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, with the first column aligned left and the numbers aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
