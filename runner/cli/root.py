"""The `gptj` program. Commands import heavy modules inside their functions."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence

import rich_click as click

from gptj_model import __version__
from gptj_model.errors import FileFault
from runner.cli.convert import convert
from runner.cli.data.making import data
from runner.cli.doctor import doctor
from runner.cli.download import download
from runner.cli.eval import evaluate
from runner.cli.export import export
from runner.cli.generate import generate
from runner.cli.golden import golden
from runner.cli.inspect import inspect
from runner.cli.new import new
from runner.cli.runs import runs
from runner.cli.shared.errors import Exit, Terminated, as_fault, exit_code
from runner.cli.shared.output import Output, abandon_stdout
from runner.cli.train import train
from runner.cli.verify import verify
from runner.planning.extras import installed_versions


def _show_version(context: click.Context, option: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    output = Output()
    output.data(f"gptj, version {__version__}")
    for name, version in installed_versions():
        output.data(f"{name} {version or 'is not installed'}")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version, and those of the libraries, and exit.",
)
def root() -> None:
    """Convert GPT-J between PyTorch, TensorFlow and Cerebras, prove the result, and train on."""


_COMMANDS = (
    download,
    new,
    convert,
    verify,
    golden,
    inspect,
    data,
    train,
    evaluate,
    generate,
    export,
    runs,
    doctor,
)
for _command in _COMMANDS:
    root.add_command(_command)


#: When Python looks for garbage: importing a framework makes a million objects, which are none, and
#: by default it looks at them again and again, a quarter of the time.
_SELDOM = (50_000, 20, 50)


def main(
    argv: Sequence[str] | None = None, *, command: click.Command = root, name: str = "gptj"
) -> int:
    """Run the program, or one command as a program; return its exit code, and raise nothing."""
    if argv is None:  # the process is the program's own
        gc.set_threshold(*_SELDOM)
    arguments = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminate)
    # For faults that are reported before the command has read its options.
    output = Output(json="--json" in arguments, quiet="--quiet" in arguments)
    try:
        code = command.main(arguments, prog_name=name, standalone_mode=False)
        if sys.stdout is None:
            raise FileFault(
                "stdout is closed, so the result cannot be printed",
                hint="open it, for example to /dev/null",
            )
        sys.stdout.flush()
        return int(code or Exit.OK)
    except (KeyboardInterrupt, click.Abort) as e:
        return _stopped(output, "interrupted", Exit.INTERRUPTED, e)
    except Terminated as e:
        return _stopped(output, "terminated", Exit.TERMINATED, e)
    except BrokenPipeError:
        abandon_stdout()
        return Exit.OPERATIONAL
    except Exception as e:
        fault = as_fault(e)
        if fault is None or os.environ.get("GPTJ_DEBUG") == "1":
            if os.environ.get("GPTJ_DEBUG") == "1":
                raise
            return _bug(output, e)
        output.fail(fault, {})
        return exit_code(fault)


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def _stopped(output: Output, word: str, code: Exit, stop: BaseException) -> int:
    from gptj_model.errors import GptjError

    # Notes say how to resume the work that was interrupted.
    stop = stop.__context__ or stop  # click wraps an interruption
    hint = "; ".join(getattr(stop, "__notes__", ())) or "run it again"
    fault = GptjError(f"{word}; nothing incomplete is left under its final name", hint=hint)
    output.fail(fault, {})
    return code


def _bug(output: Output, error: Exception) -> int:
    from gptj_model.errors import GptjError

    fault = GptjError(
        f"a fault in gptj itself: {type(error).__name__}: {error}",
        hint="run it again with GPTJ_DEBUG=1 for the traceback, and report it",
    )
    output.fail(fault, {})
    return Exit.OPERATIONAL


if __name__ == "__main__":
    sys.exit(main())
