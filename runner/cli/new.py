"""`gptj new`: a random checkpoint, for trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from gptj_convert.options import DTYPES
from gptj_model.config import PRESETS
from runner.cli.command import PATH, SIZE, command, parse_settings
from runner.cli.output import Output
from runner.cli.progress import progress


@command
@click.option("--preset", type=click.Choice(list(PRESETS)), default="tiny", show_default=True)
@click.option("--out", type=PATH, default="gpt-j-new", show_default=True, help="Folder to make.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="A config field.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
)
@click.option("--max-shard-size", "max_shard_bytes", type=SIZE, help="As 2GB or 500MiB.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def new(
    output: Output,
    preset: str,
    out: Path,
    seed: int,
    settings: tuple[str, ...],
    dtype: str,
    max_shard_bytes: int | None,
    force: bool,
) -> dict[str, Any]:
    """Write a random Hugging Face GPT-J of the true structure, with its tokenizer."""
    from gptj_convert.random_checkpoint import write_random_checkpoint
    from gptj_model.config import GPTJConfig

    config = GPTJConfig.preset(preset, **parse_settings(settings))
    with progress(output, "writing") as report:
        for event in write_random_checkpoint(
            config, out, seed=seed, dtype=dtype, max_shard_bytes=max_shard_bytes, force=force
        ):
            report(event.done, event.total, event.what)
    output.data(str(out))
    return {"output": str(out)}


new.name = "new"
