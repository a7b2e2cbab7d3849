"""`gptj golden`: recordings of what an original outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from gptj_convert.options import DTYPES
from runner.cli.shared.command import CONFIG_HELP, PATH, command
from runner.cli.shared.output import Output
from runner.cli.shared.progress import progress

DEFAULT_OUT = Path("golden-recording")


@click.group()
def golden() -> None:
    """Record what a model outputs, to verify where PyTorch is not."""


@command
@click.argument("model", type=PATH)
@click.option("--out", type=PATH, default=DEFAULT_OUT, show_default=True, help="Folder to make.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Round the weights to it first.  [default: do not]"
)
@click.option("--note", help="What the recording is of, in words.  [default: the model's path]")
@click.option("--config", "config_file", type=PATH, help=f"{CONFIG_HELP}, if none is beside it.")
@click.option("--force", is_flag=True, help="Replace an existing folder.")
def record(
    output: Output,
    model: Path,
    out: Path,
    dtype: str | None,
    note: str | None,
    config_file: Path | None,
    force: bool,
) -> dict[str, Any]:
    """Run Hugging Face's model on the battery of prompts, and keep what it gives.

    `gptj verify --against-golden DIR` holds a converted checkpoint against the recording.
    """
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.verification.recording import record as run

    with (
        open_checkpoint(model, config_file=config_file) as checkpoint,
        progress(output, "recording", in_bytes=False) as tell,
    ):
        events = run(checkpoint, out, dtype=dtype, made_by=note or str(model), force=force)
        for event in events:
            tell(event.done, event.total, event.what)
    size = sum(path.stat().st_size for path in out.iterdir())
    output.note(f"{model} → {out}: {size / 1e6:.1f} MB")
    output.data(str(out))
    return {"output": str(out), "bytes": size}


golden.add_command(record)
