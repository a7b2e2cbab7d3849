"""`gptj golden`: recordings of a model's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from gptj_convert.options import DTYPES
from runner.cli.shared.command import command
from runner.cli.shared.options import CHECKPOINT, config_option, force_option, out_option
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow

DEFAULT_OUT = Path("golden-recording")


@click.group()
def golden() -> None:
    """Record a model's outputs, to verify conversions without PyTorch."""


@command(
    "gptj golden record gpt-j-6b --out recording",
    "gptj golden record gpt-j-6b --dtype bfloat16 --note 'GPT-J-6B in bfloat16'",
)
@click.argument("model", type=CHECKPOINT)
@out_option(DEFAULT_OUT)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype that the weights are rounded to first.  [default: no rounding]",
)
@click.option(
    "--note", help="Description of the model, kept with the recording.  [default: its path]"
)
@config_option
@force_option
def record(
    output: Output,
    model: Path,
    out: Path,
    dtype: str | None,
    note: str | None,
    config_file: Path | None,
    force: bool,
) -> dict[str, Any]:
    """Run Hugging Face's model on a fixed set of prompts, and record its outputs.

    `gptj verify --against-golden DIR` compares a converted checkpoint with the recording.
    """
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.verification.recording import record as run

    with open_checkpoint(model, config_file=config_file) as checkpoint:
        work = run(checkpoint, out, dtype=dtype, made_by=note or str(model), force=force)
        follow(output, "recording", work, in_bytes=False)
    size = sum(path.stat().st_size for path in out.iterdir())
    output.note(f"{model} → {out}: {size / 1e6:.1f} MB")
    output.data(str(out))
    return {"output": str(out), "bytes": size}


golden.add_command(record)
