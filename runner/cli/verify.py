"""`gptj verify`: prove that a converted checkpoint is its source."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_convert.options import ALL_LEVELS, DEFAULT_LEVEL, DEFAULT_OUT, LEVELS, MODEL_LEVELS
from runner.cli.shared.command import CONFIG_HELP, PATH, command, note_memory
from runner.cli.shared.errors import Exit
from runner.cli.shared.output import Output
from runner.cli.shared.progress import progress
from runner.cli.shared.verdict_lines import say_self_test, say_verdict

if TYPE_CHECKING:
    from gptj_convert.verification.evidence.verdict import Verdict

DEFAULT_CONVERTED = DEFAULT_OUT["tf"]
#: What `--against-golden` without a folder stands for.
_OWN_RECORDING = "the program's own"


@command
@click.argument("converted", type=PATH, default=DEFAULT_CONVERTED)
@click.option("--against", type=PATH, help="The original.  [default: what the manifest names]")
@click.option(
    "--against-golden",
    metavar="[DIR]",
    is_flag=False,
    flag_value=_OWN_RECORDING,
    help="Hold it against a recording of the original instead; neither the original nor PyTorch "
    "is needed.  [a small model's that comes with the program, if none is named]",
)
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
@click.option("--thorough", is_flag=True, help="Also run a prompt of the model's full length.")
@click.option("--keep-going", is_flag=True, help="Run later levels although one failed.")
@click.option("--report", type=PATH, help="Write the outcome as an HTML page, too.")
@click.option(
    "--self-test",
    is_flag=True,
    help="Instead: plant faults in memory, and show how each is found and by what margin.",
)
@click.option(
    "--adapter",
    type=PATH,
    help="Folder of an adapter (peft) that is merged into the source first.  "
    "[default: the one that the manifest names]",
)
@click.option("--config", "config_file", type=PATH, help=f"{CONFIG_HELP}, if a side has none.")
def verify(
    output: Output,
    converted: Path,
    against: Path | None,
    against_golden: str | None,
    tolerance: float | None,
    level: str,
    thorough: bool,
    keep_going: bool,
    report: Path | None,
    self_test: bool,
    adapter: Path | None,
    config_file: Path | None,
) -> dict[str, Any]:
    """Compare a converted checkpoint with its source; exit 3 if they differ.

    Levels: structure (names, shapes, config), weights (every tensor, bit for bit), logits (hidden
    states and logits against Hugging Face's model, block by block), gradients (of every tensor),
    generation (token for token, with and without a cache). They stop at the first that fails.
    """
    if against and against_golden:
        raise click.UsageError("--against and --against-golden exclude each other")
    if adapter and against_golden:
        raise click.UsageError("--adapter is merged into a source, which --against-golden has not")
    if self_test and (against_golden or report):
        raise click.UsageError("--self-test goes with neither --against-golden nor --report")
    if against_golden and LEVELS.index(DEFAULT_LEVEL) < _index(level):
        raise click.UsageError(f"a recording goes up to level {DEFAULT_LEVEL}, found {level}")
    if report:
        _refuse_unwritable(report)
    from golden import tolerances

    if self_test or level in (*MODEL_LEVELS, ALL_LEVELS):
        from runner.cli.shared import framework

        framework.prepare(proving=True)
    tolerance = tolerance or tolerances.LOGITS
    if self_test:
        return _self_test(output, converted, against, adapter, tolerance, config_file)

    from gptj_convert.verification.evidence.verdict import Verdict
    from gptj_convert.verification.verify import adapter_of, levels_up_to, source_of
    from gptj_convert.verification.verify import verify as run

    verdict = Verdict(tolerance, levels_up_to(level))
    if against_golden:
        from golden.recording import read_recording
        from gptj_convert.verification.against_recording import verify_against_recording

        own = against_golden == _OWN_RECORDING
        recording = read_recording(None if own else Path(against_golden))
        held_against = f"a recording of {recording.made_by}"
        events = verify_against_recording(converted, recording, verdict, config_file=config_file)
    else:
        source = against or source_of(converted)
        adapter = adapter or adapter_of(converted, source)
        held_against = f"{source} with {adapter}" if adapter else str(source)
        events = run(
            converted,
            source,
            verdict,
            adapter=adapter,
            config_file=config_file,
            keep_going=keep_going,
            thorough=thorough,
        )
    output.note(f"{converted} against {held_against}")
    with progress(output, "verifying", in_bytes=False) as tell:
        for event in events:
            tell(event.done, event.total, event.what)
    say_verdict(output, verdict)
    note_memory(output, verdict.planned_memory)
    fields = {"output": str(converted), "against": held_against, **verdict.to_json()}
    if report:
        _write_report(report, {"ok": verdict.ok, **fields}, converted)
        output.note(f"report: {report}")
        fields["report"] = str(report)
    return fields | {"exit": _exit(verdict)}


def _index(level: str) -> int:
    return len(LEVELS) - 1 if level == ALL_LEVELS else LEVELS.index(level)


def _exit(verdict: Verdict) -> Exit:
    return Exit.OK if verdict.ok else Exit.MISMATCH


def _refuse_unwritable(report: Path) -> None:
    """Say so now, rather than after minutes of work."""
    import os

    from gptj_model.errors import FileFault

    if report.is_dir() or not report.parent.is_dir() or not os.access(report.parent, os.W_OK):
        raise FileFault(
            f"{report}: cannot be written, expected a file in a folder that can be written to"
        )


def _write_report(report: Path, fields: dict[str, Any], converted: Path) -> None:
    from gptj_convert.conversion.manifest import Manifest
    from gptj_convert.resources.environment import describe
    from gptj_convert.verification.report import write_report
    from gptj_model.errors import FileFault

    facts: dict[str, dict[str, Any]] = {
        "How to run it again": {"command": shlex.join(["gptj", *sys.argv[1:]])},
        "Environment": describe(),
    }
    try:
        manifest = Manifest.read(converted if converted.is_dir() else converted.parent)
    except FileFault:
        manifest = None  # the verdict says so
    if manifest:
        source = manifest.source.get("files", {})
        facts["Files of the original, by the manifest"] = _stated(source)
        facts["Files of the converted checkpoint, by the manifest"] = _stated(manifest.files)
    write_report(report, fields, facts)


def _stated(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    words = {"bytes": "{:,} bytes", "sha256": "SHA-256 {}"}
    return {
        name: ", ".join(words[key].format(file[key]) for key in words if key in file)
        for name, file in files.items()
    }


def _self_test(
    output: Output,
    converted: Path,
    against: Path | None,
    adapter: Path | None,
    tolerance: float,
    config_file: Path | None,
) -> dict[str, Any]:
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.conversion.merged_checkpoint import open_merged
    from gptj_convert.verification.self_test import SelfTest, self_test
    from gptj_convert.verification.verify import adapter_of, source_of

    source = against or source_of(converted)
    adapter = adapter or adapter_of(converted, source)
    result = SelfTest(tolerance, [])
    with (
        open_checkpoint(converted, config_file=config_file) as checkpoint,
        open_merged(source, adapter, config_file=config_file) as original,
        progress(output, "planting", in_bytes=False) as tell,
    ):
        for event in self_test(checkpoint, original, result):
            tell(event.done, event.total, event.what)
    say_self_test(output, result)
    code = Exit.OK if result.ok else Exit.MISMATCH
    return {"output": str(converted), **result.to_json(), "exit": code}
