"""`gptj export`: a model in the format of a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from gptj_convert.options import DTYPES
from runner.cli.shared.command import command, note_memory
from runner.cli.shared.model_choice import default_model
from runner.cli.shared.options import CHECKPOINT, COUNT, config_option, force_option, out_option
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow
from runner.config.execution import Backend

DEFAULT_OUT = Path("saved-model")


@click.group()
def export() -> None:
    """Write a model in the format of a server."""


@command(
    "gptj export saved-model converted/ --out serving/gptj/1",
    "gptj export saved-model model_dir@best --dtype bfloat16 --max-length 1024",
)
@click.argument("source", type=CHECKPOINT, required=False)
@out_option(DEFAULT_OUT)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default=DTYPES[0],
    show_default=True,
    help="Dtype of the variables and of the products; 16 bits take half the memory, and round.",
)
@click.option(
    "--max-length",
    type=COUNT,
    help="Largest number of tokens of a prompt with its continuation that signature generate "
    "accepts, which limits the memory of a request.  [default: the model's n_positions]",
)
@config_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything but the weights, and show the disk space and memory needed.",
)
@force_option
def saved_model(
    output: Output,
    source: Path | None,
    out: Path,
    dtype: str,
    max_length: int | None,
    config_file: Path | None,
    dry_run: bool,
    force: bool,
) -> dict[str, Any]:
    """Write a TensorFlow SavedModel, which TensorFlow runs without this program.

    Signature serve returns the logits of token ids. Signature generate continues prompts with a
    cache of keys and values, greedily or by sampling, to the tokens of `gptj generate`.
    """
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.conversion.plan import match
    from gptj_convert.files.output_folder import refuse_overlap
    from gptj_convert.settings.generation_settings import stop_tokens
    from runner.cli.shared import framework
    from runner.generation.saved_model import (
        refuse_impossible,
        weight_bytes,
        write_saved_model,
    )

    source = source or default_model()
    with open_checkpoint(source, config_file=config_file) as checkpoint:
        config = checkpoint.config
        match(checkpoint)
        refuse_overlap(out, checkpoint.path, checkpoint.files)
        longest = _longest(max_length, config.n_positions)
        ends = [i for i in stop_tokens(checkpoint.folder, config) if 0 <= i < config.vocab_size]
        planned = refuse_impossible(checkpoint, out, dtype, force=force)
        fields = {
            "output": str(out),
            "disk_bytes": weight_bytes(checkpoint, dtype),
            "planned_rss_bytes": planned,
            "signatures": ["serve", "generate"],
            "stop_tokens": ends,
            "max_length": longest,
        }
        output.note(
            f"{source} → {out}: {fields['disk_bytes'] / 1e9:.2f} GB of disk, "
            f"{planned / 1e9:.2f} GB of memory"
        )
        _note_ends(output, ends)
        if not checkpoint.companions:
            output.note("note: no tokenizer files beside the weights, so none are copied")
        if dry_run:
            return fields
        framework.prepare(backend=Backend.TENSORFLOW)
        from runner.evaluation.restore import loaded

        work = write_saved_model(
            loaded(checkpoint, config, dtype=dtype),
            checkpoint,
            out,
            ends=ends,
            longest=longest,
            force=force,
        )
        follow(output, "exporting", work, in_bytes=False)
    note_memory(output, planned)
    output.data(str(out))
    return fields


saved_model.name = "saved-model"
export.add_command(saved_model)


def _longest(max_length: int | None, positions: int) -> int:
    if max_length is None:
        return positions
    if not 1 < max_length <= positions:
        raise click.UsageError(
            f"--max-length is {max_length}, expected 2 to the model's {positions} positions"
        )
    return max_length


def _note_ends(output: Output, ends: list[int]) -> None:
    if ends:
        output.note(f"texts end at token {', '.join(map(str, ends))}")
    else:
        output.note("note: no config says which token ends a text, so only max_new_tokens does")
