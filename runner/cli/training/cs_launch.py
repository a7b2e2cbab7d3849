"""A run on a CS system, as the command line starts and shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runner.cli.shared.errors import Exit
from runner.cli.shared.output import Output, one_line

if TYPE_CHECKING:
    from runner.cerebras import CsJob

#: Exit codes of a client that ended by a signal that this program forwarded.
_STOPPED = {130: Exit.INTERRUPTED, 143: Exit.TERMINATED}


def run_on_cs(output: Output, job: CsJob, *, dry_run: bool) -> dict[str, Any]:
    """Start the client, or only print its command line; return the fields of the JSON object."""
    from runner.cerebras import LOG_FILE, failure, follow, prepare

    launch = prepare(job)
    fields: dict[str, Any] = {"output": str(job.model_dir), "command": list(launch.command)}
    for path in launch.writes:
        output.note(f"{'would write' if dry_run else 'writing'} {path}")
    output.data(launch.shell)
    if dry_run:
        for problem in launch.problems:
            output.note(f"missing: {problem.message}; {problem.hint}")
        return fields | {"missing": [problem.message for problem in launch.problems]}
    if launch.problems:
        raise launch.problems[0]
    code = follow(launch, job.model_dir, lambda line: output.note(one_line(line)))
    fields |= {"client_exit_code": code, "log": str(job.model_dir / LOG_FILE)}
    if code == 0:
        return fields
    if code in _STOPPED:
        output.note("the client was stopped; run the same command to resume the run")
        return fields | {"exit": _STOPPED[code]}
    fault = failure(code, job.model_dir)
    output.say_fault(fault)
    error = {"kind": fault.kind, "message": fault.message, "hint": fault.hint}
    return fields | {"error": error, "exit": Exit.OPERATIONAL}
