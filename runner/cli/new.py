"""`gptj new`: write a random checkpoint for trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from gptj_convert.options import DTYPES, FILE_FORMATS, LAYOUTS, ROW_MAJOR, TRANSPOSED
from gptj_model.config import PRESETS
from runner.cli.shared.command import command, parse_settings
from runner.cli.shared.options import force_option, max_shard_size_option, out_option
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow


@command(
    "gptj new --out tiny",
    "gptj new --preset 125m --set n_layer=2 --dtype bfloat16 --out small",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="tiny",
    show_default=True,
    help="Size of the model.",
)
@out_option("gpt-j-new")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Set a field of config.json, such as n_layer=2; can be given several times.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Dtype of the weights.",
)
@click.option(
    "--file-format",
    type=click.Choice(list(FILE_FORMATS)),
    default="safetensors",
    show_default=True,
    help="File format of the weights.",
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default=ROW_MAJOR,
    show_default=True,
    help="Memory order of the linear layers' weights in a .bin file; the public GPT-J-6B stores "
    "them as transposed views.",
)
@max_shard_size_option
@force_option
def new(
    output: Output,
    preset: str,
    out: Path,
    seed: int,
    settings: tuple[str, ...],
    dtype: str,
    file_format: str,
    layout: str,
    max_shard_bytes: int | None,
    force: bool,
) -> dict[str, Any]:
    """Write a random Hugging Face GPT-J of the true structure, with its tokenizer."""
    from gptj_convert.conversion.random_checkpoint import write_random_checkpoint
    from gptj_model.config import GPTJConfig

    if layout == TRANSPOSED and file_format != "bin":
        raise click.UsageError(f"--layout {TRANSPOSED} goes with --file-format bin")
    config = GPTJConfig.preset(preset, **parse_settings(settings))
    work = write_random_checkpoint(
        config,
        out,
        seed=seed,
        dtype=dtype,
        file_format=file_format,
        transposed=layout == TRANSPOSED,
        max_shard_bytes=max_shard_bytes,
        force=force,
    )
    follow(output, "writing", work)
    output.data(str(out))
    return {"output": str(out)}


new.name = "new"
