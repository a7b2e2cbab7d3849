"""`gptj runs`: compare training runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from runner.cli.shared.command import command
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import PATH, html_option
from runner.cli.shared.output import Output
from runner.config.eval_metric import EvalMetric

if TYPE_CHECKING:
    from runner.reports.run_history import RunHistory

#: Seconds between two versions of a page that follows a run.
_RELOAD = 10


@command(
    "gptj runs model_dir",
    "gptj runs runs/a runs/b --html runs.html",
    "gptj runs model_dir --html run.html --follow",
    rules=OptionRules(needs={"--follow": "--html"}),
)
@click.argument("model_dirs", type=PATH, nargs=-1, required=True, metavar="MODEL_DIR...")
@html_option("curves, evaluations and resumptions of each run")
@click.option(
    "--follow",
    is_flag=True,
    help="Write the page again every 10 s while a run trains; an open page reloads itself.",
)
def runs(
    output: Output, model_dirs: tuple[Path, ...], html: Path | None, follow: bool
) -> dict[str, Any]:
    """Compare runs: their steps, losses, rates and evaluations, and the parameters that differ.

    Reads metrics.jsonl, evaluations.jsonl and params.yaml in each folder; a run may still be
    training.
    """
    from runner.reports.run_history import differences, read_run
    from runner.reports.runs_page import write_page

    found = [read_run(folder) for folder in model_dirs]
    while html and follow and any(run.is_running for run in found):
        write_page(html, found, differences(found), reload=_RELOAD)
        output.note(", ".join(f"{run.name}: step {run.step}" for run in found if run.is_running))
        _wait(model_dirs)
        found = [read_run(folder) for folder in model_dirs]
    differing = differences(found)
    _print_runs(output, found, differing)
    if html:
        write_page(html, found, differing)
        output.note(f"wrote {html}")
    return {"runs": [_fields(run) for run in found], "differences": differing} | (
        {"html": str(html)} if html else {}
    )


def _wait(model_dirs: Sequence[Path]) -> None:
    """Wait for the next version of the page, or until no run trains anymore."""
    from runner.training.run.folder import is_locked

    end = time.monotonic() + _RELOAD
    while time.monotonic() < end and any(map(is_locked, model_dirs)):
        time.sleep(0.5)


def _print_runs(
    output: Output, found: Sequence[RunHistory], differing: Mapping[str, Sequence[Any]]
) -> None:
    from runner.reports.runs_page import figure

    header = ["run", "step", "loss", "eval loss", "tokens/s"]
    values = [(r.step, r.loss, r.eval_loss, r.tokens_per_second) for r in found]
    rows = [[run.name, *map(figure, row)] for run, row in zip(found, values, strict=True)]
    for line in _aligned([header, *rows]):
        output.data(line)
    for key, given in differing.items():
        output.data(f"{key}: " + ", ".join("–" if v is None else str(v) for v in given))
    for run in found:
        if run.evaluations:
            output.data("")
            columns = [metric.row_key for metric in EvalMetric]
            rows = [
                [str(row["step"]), *(figure(row.get(key)) for key in columns)]
                + (["best"] if run.best[:1] == [row["step"]] else [""])
                for row in run.evaluations
            ]
            for line in _aligned([[f"{run.name}, step", *columns, ""], *rows]):
                output.data(line.rstrip())


def _fields(run: RunHistory) -> dict[str, Any]:
    return {
        "model_dir": run.name,
        "step": run.step,
        "target": run.target,
        "loss": run.loss,
        "eval_loss": run.eval_loss,
        "tokens_per_second": run.tokens_per_second,
        "running": run.is_running,
        "evaluations": list(run.evaluations),
        "best": list(run.best),
        "resumed_at": [start.step for start in run.resumptions],
        "skipped_steps": run.skipped_steps,
    }


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, with the first column aligned left and the numbers aligned right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
