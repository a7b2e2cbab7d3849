"""Options that several commands have, each defined once with one text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from gptj_convert.options import parse_bytes
from runner.config.execution import Backend, Execution

#: Decorates the function of a command with an option.
Decorator = Callable[[Any], Any]

#: A path argument as pathlib gives it.
PATH = click.Path(path_type=Path)


class _ByteSize(click.ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_bytes(value)
        except ValueError as e:
            self.fail(str(e), param, ctx)


class _CheckpointPath(click.Path):
    """Path of a checkpoint; `RUN@best` and `RUN@STEP` name one of a run's."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from gptj_convert.formats.layouts.tf import find_named

        return find_named(Path(value))


class _Place(click.Path):
    """Path, or address in object storage such as s3://bucket/folder."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not isinstance(value, str):  # a default
            return value
        from runner.data.remote.path import place

        return place(value)


CHECKPOINT = _CheckpointPath()
PLACE = _Place()
#: A number of bytes with an optional unit.
SIZE = _ByteSize()
COUNT = click.IntRange(min=1)
COUNT_OR_ZERO = click.IntRange(min=0)

config_option = click.option(
    "--config",
    "config_file",
    type=PATH,
    metavar="FILE",
    help="Configuration of a model that has none beside its weights: config.json, params.yaml or "
    "a trainer YAML of the CS client.",
)
params_option = click.option(
    "--params",
    "params_file",
    type=PATH,
    metavar="FILE",
    help="Parameters in YAML.  [default: params.yaml beside the weights]",
)
settings_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a parameter of the YAML, such as optimizer.learning_rate=1e-4; can be given "
    "several times.",
)
model_option = click.option(
    "--model",
    type=CHECKPOINT,
    help="Checkpoint of any format.  [default: model_dir if it has checkpoints, else converted]",
)
eval_steps_option = click.option(
    "--eval-steps", type=COUNT_OR_ZERO, help="Number of batches to evaluate; 0 means all."
)
execution_option = click.option(
    "--execution",
    type=click.Choice([str(way) for way in Execution]),
    help="Where the weights are: resident in memory, or streamed from disk one block at a time.  "
    "[default: as the YAML says]",
)
backend_option = click.option(
    "--backend",
    type=click.Choice([str(one) for one in Backend]),
    help="Library that computes: TensorFlow, or JAX, which shards a model across devices.  "
    "[default: as the YAML says, else TensorFlow where it is installed]",
)
max_shard_size_option = click.option(
    "--max-shard-size",
    "max_shard_bytes",
    type=SIZE,
    help="Largest size of one weight file, such as 2GB or 500MiB; larger models are written as "
    "several shards.",
)
resume_option = click.option(
    "--resume", is_flag=True, help="Resume an interrupted run of the same command."
)
force_option = click.option(
    "--force",
    is_flag=True,
    help="Overwrite an existing output, and discard what an interrupted run left.",
)


def out_option(
    default: Path | str | None = None,
    *,
    default_text: str = "",
    required: bool = False,
    kind: click.ParamType = PATH,
) -> Decorator:
    """Return `--out` with its default, or with a text that says how the default is found; `kind` is
    `PLACE` where the output may be in object storage."""
    shown = f"  [default: {default_text}]" if default_text else ""
    # A default of None would count as a value.
    value: dict[str, Any] = {"required": True} if required else {"default": default}
    return click.option(
        "--out",
        type=kind,
        **value,
        show_default=default is not None,
        help=f"Folder to write.{shown}",
    )


def tokenizer_option(*, required: bool, more: str = "") -> Decorator:
    """Return `--tokenizer`; `more` says what a command does with it that others do not."""
    return click.option(
        "--tokenizer",
        type=PATH,
        required=required,
        metavar="DIR",
        help=f"Folder with tokenizer.json, or with vocab.json and merges.txt{more}.",
    )


def html_option(what: str) -> Decorator:
    """Return `--html` for a page that shows `what`."""
    return click.option(
        "--html", type=PATH, metavar="FILE", help=f"Also write an HTML page with {what}."
    )


def options(*decorators: Decorator) -> Decorator:
    """Return several options as one decorator, listed by `--help` in the order given."""

    def add(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return add
