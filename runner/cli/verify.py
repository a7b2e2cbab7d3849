"""`gptj verify`: prove that a converted checkpoint computes what its source computes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_convert.options import (
    ALL_LEVELS,
    DEFAULT_LEVEL,
    DEFAULT_OUT,
    LEVELS,
    MODEL_LEVELS,
    RECORDED_LEVELS,
)
from runner.cli.evaluation.harness import (
    TaskType,
    fewshot_option,
    include_option,
    requests_of,
)
from runner.cli.shared.command import command, note_memory
from runner.cli.shared.errors import Exit
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import (
    CHECKPOINT,
    COUNT_OR_ZERO,
    PATH,
    backend_option,
    config_option,
)
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow
from runner.cli.shared.verdict_lines import say_self_test, say_verdict

if TYPE_CHECKING:
    from gptj_convert.verification.evidence.verdict import Verdict

DEFAULT_CONVERTED = DEFAULT_OUT["tf"]
#: Value of `--against-golden` without a folder.
_OWN_RECORDING = "the program's own"


def _mode(values: Mapping[str, Any]) -> str:
    if values["self_test"]:
        return "--self-test"
    return "--against-golden" if values["against_golden"] else "a comparison with the source"


RULES = OptionRules(
    mode=_mode,
    takes={
        "a comparison with the source": (
            "--against", "--adapter", "--level", "--thorough", "--keep-going", "--report", "--task",
            "--include-path", "--num-fewshot", "--limit",
        ),
        "--against-golden": ("--against-golden", "--level", "--report"),
        "--self-test": ("--self-test", "--against", "--adapter"),
    },
    needs={"--include-path": "--task", "--num-fewshot": "--task", "--limit": "--task"},
)  # fmt: skip


@command(
    "gptj verify converted/ --against gpt-j-6b --level all --report report.html",
    "gptj verify converted/ --against-golden recording/",
    "gptj verify converted/ --level tasks --task lm-eval:piqa --limit 100",
    rules=RULES,
)
@click.argument("converted", type=CHECKPOINT, default=DEFAULT_CONVERTED)
@click.option(
    "--against",
    type=CHECKPOINT,
    help="Source to compare with.  [default: the source that the manifest names]",
)
@click.option(
    "--against-golden",
    metavar="[DIR]",
    is_flag=False,
    flag_value=_OWN_RECORDING,
    help="Compare with a recording of the source; needs neither the source nor PyTorch.  "
    "[default: the recording of a small model that comes with the program]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    help="Largest |Δ| of the logits that passes, divided by their standard deviation.  "
    "[default: 1e-4]",
)
@click.option(
    "--level",
    type=click.Choice((*LEVELS, ALL_LEVELS)),
    default=DEFAULT_LEVEL,
    show_default=True,
    help="Last level to run.",
)
@click.option("--thorough", is_flag=True, help="Also run a prompt of the model's full length.")
@click.option("--keep-going", is_flag=True, help="Run the later levels even if one fails.")
@click.option("--report", type=PATH, metavar="FILE", help="Also write the outcome as an HTML page.")
@click.option(
    "--self-test",
    is_flag=True,
    help="Plant faults in memory instead, and show how each one is found and by what margin.",
)
@click.option(
    "--adapter",
    type=PATH,
    help="Folder of a LoRA adapter (peft format) to merge into the source first.  "
    "[default: the adapter that the manifest names]",
)
@click.option(
    "--task",
    type=TaskType([]),
    help="Tasks of EleutherAI's lm-evaluation-harness whose requests level tasks puts to both "
    "sides, such as lm-eval:piqa,hellaswag.  [default: a few passages to continue, built in]",
)
@include_option
@fewshot_option
@click.option(
    "--limit",
    type=COUNT_OR_ZERO,
    default=0,
    help="Number of documents of each task of the harness; 0 means all.",
)
@config_option
@backend_option
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
    task: str | None,
    include: tuple[Path, ...],
    fewshot: int | None,
    limit: int,
    config_file: Path | None,
    backend: str | None,
) -> dict[str, Any]:
    """Compare a converted checkpoint with its source; exit 3 if they differ.

    The levels are structure (names, shapes, config), weights (every tensor, bit for bit), logits
    (hidden states and logits against Hugging Face's model, block by block), gradients (of every
    tensor), generation (token for token, with and without a cache) and tasks (log-likelihoods that
    tasks ask for, request by request). They run in this order and stop at the first that fails.
    """
    if against_golden and level not in RECORDED_LEVELS:
        raise click.UsageError(f"a recording goes up to level {RECORDED_LEVELS[-1]}, found {level}")
    if report:
        _refuse_unwritable(report)
    from golden import tolerances

    if self_test or level in (*MODEL_LEVELS, ALL_LEVELS):
        from runner.cli.shared import framework

        framework.prepare(proving=True, backend=backend)
    tolerance = tolerance or tolerances.LOGITS
    if self_test:
        return _self_test(output, converted, against, adapter, tolerance, config_file)

    from gptj_convert.verification.verify import adapter_of, source_of
    from gptj_convert.verification.verify import verify as run

    if against_golden:
        from golden.recording import read_recording
        from gptj_convert.verification.against_recording import verify_against_recording

        own = against_golden == _OWN_RECORDING
        recording = read_recording(None if own else Path(against_golden))
        compared_with = f"a recording of {recording.made_by}"
        work = verify_against_recording(
            converted, recording, tolerance=tolerance, level=level, config_file=config_file
        )
    else:
        source = against or source_of(converted)
        adapter = adapter or adapter_of(converted, source)
        compared_with = f"{source} with {adapter}" if adapter else str(source)
        tasks = requests_of(
            output,
            converted,
            source,
            task,
            level=level,
            include=include,
            fewshot=fewshot,
            limit=limit,
            config_file=config_file,
        )
        work = run(
            converted,
            source,
            tolerance=tolerance,
            level=level,
            adapter=adapter,
            config_file=config_file,
            keep_going=keep_going,
            thorough=thorough,
            tasks=tasks,
        )
    output.note(f"{converted} against {compared_with}")
    verdict = follow(output, "verifying", work, in_bytes=False)
    say_verdict(output, verdict)
    note_memory(output, verdict.planned_memory)
    fields = {"output": str(converted), "against": compared_with, **verdict.to_json()}
    if report:
        _write_report(report, {"ok": verdict.ok, **fields}, converted)
        output.note(f"report: {report}")
        fields["report"] = str(report)
    return fields | {"exit": _exit(verdict)}


def _exit(verdict: Verdict) -> Exit:
    return Exit.OK if verdict.ok else Exit.MISMATCH


def _refuse_unwritable(report: Path) -> None:
    """Refuse a report that cannot be written, before minutes of work rather than after."""
    import os

    from gptj_model.errors import FileFault

    if report.is_dir() or not report.parent.is_dir() or not os.access(report.parent, os.W_OK):
        raise FileFault(f"{report}: cannot be written, expected a file in a writable folder")


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
        manifest = None  # the verdict reports it
    if manifest:
        source = manifest.source.get("files", {})
        facts["Files of the source, as the manifest records them"] = _recorded(source)
        facts["Files of the converted checkpoint, as the manifest records them"] = _recorded(
            manifest.files
        )
    write_report(report, fields, facts)


def _recorded(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
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
    from gptj_convert.verification.self_test import self_test
    from gptj_convert.verification.verify import adapter_of, source_of

    source = against or source_of(converted)
    adapter = adapter or adapter_of(converted, source)
    with (
        open_checkpoint(converted, config_file=config_file) as checkpoint,
        open_merged(source, adapter, config_file=config_file) as original,
    ):
        work = self_test(checkpoint, original, tolerance)
        result = follow(output, "planting", work, in_bytes=False)
    say_self_test(output, result)
    code = Exit.OK if result.ok else Exit.MISMATCH
    return {"output": str(converted), **result.to_json(), "exit": code}
