"""Exit codes of faults: the one place where they are assigned."""

from __future__ import annotations

from enum import IntEnum

import click

from gptj_convert.files.output_file import FULL
from gptj_model.errors import ConfigError, FileFault, GptjError, MemoryFault, UsageError
from runner.planning.extras import extra_of, install_command

#: Errors of JAX and of TensorFlow, neither of which is imported here.
_OUT_OF_MEMORY = ("JaxRuntimeError", "XlaRuntimeError", "ResourceExhaustedError")


class Exit(IntEnum):
    """Exit codes of the program."""

    OK = 0
    OPERATIONAL = 1
    USAGE = 2
    MISMATCH = 3
    INTERRUPTED = 130
    TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler mistakes it for a fault."""


def exit_code(fault: GptjError) -> Exit:
    """Return the exit code of a fault."""
    return Exit.USAGE if isinstance(fault, UsageError | ConfigError) else Exit.OPERATIONAL


def code_of(error: BaseException) -> Exit:
    """Return the exit code of what ends the program."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return Exit.INTERRUPTED
    if isinstance(error, Terminated):
        return Exit.TERMINATED
    fault = as_fault(error)
    return exit_code(fault) if fault else Exit.OPERATIONAL


def as_fault(error: BaseException) -> GptjError | None:
    """Return the fault that an exception stands for, or None for a bug of this program.

    Notes of the exception say how to continue, and join the hint.
    """
    fault = _as_fault(error)
    if fault and getattr(error, "__notes__", None):
        fault.hint = "; ".join(filter(None, (fault.hint, *error.__notes__)))
    return fault


def _as_fault(error: BaseException) -> GptjError | None:
    if isinstance(error, GptjError):
        return error
    if isinstance(error, click.ClickException):
        message = " ".join(error.format_message().split())  # it may list choices on several lines
        return UsageError(message, hint=_usage_hint(error))
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        words = error.strerror or str(error)
        hint = "free some space and run it again" if error.errno in FULL else None
        return FileFault(f"{where}{words}", hint=hint)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return FileFault(
            f"the Python package {error.name!r} is not installed",
            hint=f"install it with `{install_command(extra_of(error.name))}`",
        )
    if "RESOURCE_EXHAUSTED" in str(error) and type(error).__name__ in _OUT_OF_MEMORY:
        return MemoryFault(
            f"a device is out of memory: {str(error).splitlines()[0][:200]}",
            hint="in training, use a smaller batch_size, model.recompute, "
            "optimizer.moments_dtype=bfloat16, a mesh of more devices or runconfig.shard_weights; "
            "--compile-only says what a step needs",
        )
    if isinstance(error, MemoryError):
        hint = "end other programs; in training, use a smaller batch or sequence length"
        return MemoryFault("out of memory", hint=hint)
    return None


def _usage_hint(error: click.ClickException) -> str | None:
    context = getattr(error, "ctx", None)
    return f"see `{context.command_path} --help`" if context else "see `gptj --help`"
