"""`gptj generate`: continue a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from runner.cli.command import PATH, command
from runner.cli.model_choice import EXECUTIONS, default_model, stated_execution
from runner.cli.output import Output


@command
@click.option("--model", type=PATH, help="Any checkpoint.  [default: model_dir, or converted]")
@click.option("--prompt", help="Text to continue.")
@click.option("--ids", help="Token ids to continue, such as 464,3290.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the most likely token.",
)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0 means all.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--execution",
    type=click.Choice(EXECUTIONS),
    help="The whole model in memory, or one block at a time, read anew for every token.  [that of "
    "the YAML beside the model]",
)
def generate(
    output: Output,
    model: Path | None,
    prompt: str | None,
    ids: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    execution: str | None,
) -> dict[str, Any]:
    """Continue a prompt, given as text or as token ids."""
    if (prompt is None) == (ids is None):
        raise click.UsageError("give one of --prompt and --ids")
    from runner.cli import tensorflow

    tensorflow.prepare()
    from gptj_model import generation
    from runner.data.tokenizer import load_tokenizer
    from runner.restore import opened_model

    path = model or default_model()
    folder = path if path.is_dir() else path.parent
    tokenizer = load_tokenizer(folder) if prompt is not None else _tokenizer_if_any(folder)
    begun = _parse_ids(ids) if ids is not None else tokenizer.encode(prompt).ids
    sampling = generation.Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    execution = execution or stated_execution(folder)
    with opened_model(path, streamed=execution == EXECUTIONS[1]) as loaded:
        end = loaded.config.eos_token_id
        made = list(generation.generate(loaded, begun, max_new_tokens, sampling, stop_at=end))
    text = tokenizer.decode([*begun, *made]) if tokenizer else None
    output.data(text if text is not None else " ".join(map(str, [*begun, *made])))
    return {"ids": [*begun, *made], "text": text}


def _tokenizer_if_any(folder: Path) -> Any:
    from gptj_model.errors import FileFault
    from runner.data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder)
    except FileFault:
        return None


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--ids takes numbers with commas between, found {text!r}") from None
