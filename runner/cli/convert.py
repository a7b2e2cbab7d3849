"""`gptj convert`: a checkpoint into another format."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from gptj_convert.options import (
    CS_BACKENDS,
    DEFAULT_DTYPE,
    DEFAULT_OUT,
    DEFAULT_SOURCE,
    DTYPES,
    GROUPINGS,
    KEEP,
    PEFT,
    PEFT_OUT,
    VOCAB_SIZES,
)
from gptj_model.errors import UsageError
from runner.cli.shared.command import CONFIG_HELP, PATH, SIZE, command, note_memory
from runner.cli.shared.errors import Terminated
from runner.cli.shared.fetching import default_folder, fetch_to
from runner.cli.shared.output import Output
from runner.cli.shared.progress import progress

if TYPE_CHECKING:
    from gptj_convert.checkpoint.open import Checkpoint
    from gptj_convert.optimizer.target import Continuation
    from gptj_model.tensors import Scheme


@command
@click.argument("source", metavar="[SRC]", type=PATH, required=False)
@click.option("--to", "target", type=click.Choice([*DEFAULT_OUT, PEFT]), required=True)
@click.option("--out", type=PATH, help="Folder to make.  [default: converted, -hf, -keras]")
@click.option(
    "--dtype",
    type=click.Choice([*DTYPES, KEEP]),
    help="Of the result.  [default: float32 for tf, else keep]",
)
@click.option(
    "--max-shard-size",
    "max_shard_bytes",
    type=SIZE,
    help="For hf: several files, each of at most so many bytes, as 2GB or 500MiB.",
)
@click.option(
    "--vocab-size",
    "vocab_choice",
    type=click.Choice(VOCAB_SIZES),
    help="Which counts if config.json and the tensors' rows disagree.  [default: they must agree]",
)
@click.option(
    "--drop",
    multiple=True,
    metavar="NAME",
    help="Leave out a tensor that is not part of the model, such as v_head.weight or 'v_head.*'; "
    "can be given several times.",
)
@click.option(
    "--share-embeddings", is_flag=True, help="Leave out a head that equals the embedding."
)
@click.option(
    "--adapter",
    type=PATH,
    help="Folder of a LoRA adapter, as the peft library saves it, to merge into SRC.",
)
@click.option(
    "--optimizer-state",
    is_flag=True,
    help="Carry over what AdamW keeps: moments, step, beta powers, loss scale.",
)
@click.option(
    "--param-groups",
    type=click.Choice(GROUPINGS),
    help="Of optimizer.pt: model.parameters(), or those with weight decay first, as "
    "transformers' Trainer has them.  [default: one]",
)
@click.option(
    "--cs-backend",
    type=click.Choice(CS_BACKENDS),
    help="Backend in the trainer.yaml of --to cs: the CS system, or this machine's processor.  "
    "[default: CSX]",
)
@click.option("--config", "config_file", type=PATH, help=f"{CONFIG_HELP}, if none is beside SRC.")
@click.option("--dry-run", is_flag=True, help="Check everything, write nothing.")
@click.option("--saturate", is_flag=True, help="Values too large for the dtype become its largest.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted conversion.")
@click.option("--force", is_flag=True, help="Replace an existing folder, or begin anew.")
def convert(
    output: Output,
    source: Path | None,
    target: str,
    out: Path | None,
    dtype: str | None,
    max_shard_bytes: int | None,
    vocab_choice: str | None,
    drop: tuple[str, ...],
    share_embeddings: bool,
    adapter: Path | None,
    optimizer_state: bool,
    param_groups: str | None,
    cs_backend: str | None,
    config_file: Path | None,
    dry_run: bool,
    saturate: bool,
    resume: bool,
    force: bool,
) -> dict[str, Any]:
    """Convert a checkpoint (default ./gpt-j-6b), bit for bit where the dtype allows.

    SRC is a folder, a .safetensors, .bin or .pt file, an index of shards, a .h5 file of Keras, a
    .mdl file of the CS client, or the prefix of a TensorFlow checkpoint; or a model on the hub,
    OWNER/NAME, OWNER/NAME@REVISION or its page's address, which is downloaded to ./NAME first.

    A run with LoRA is written with its adapter merged; `--to peft` writes the adapter alone, for
    the peft library. An adapter of that library is merged into SRC with `--adapter DIR`, with the
    bits of `merge_and_unload` in float32.
    """
    from gptj_convert.checkpoint.source_names import refuse_unmatched
    from gptj_convert.conversion.cost import conversion_memory
    from gptj_convert.conversion.execute import (
        Result,
        check_space,
        execute,
        is_resumable,
        not_carried,
        states_no_end,
    )
    from gptj_convert.conversion.merged_checkpoint import is_base, open_merged
    from gptj_convert.conversion.peft_adapter import has_adapter
    from gptj_convert.conversion.plan import make_plan
    from gptj_convert.files.output_folder import refuse_overlap
    from gptj_convert.formats.layouts.gpt2_tokenizer import last_token_id
    from gptj_convert.optimizer.decay import decay_notes
    from gptj_model.tensors import Scheme

    if resume and force:
        raise click.UsageError("--resume goes on, --force begins anew: give one of them")
    source = _on_the_disk(output, source or DEFAULT_SOURCE)
    if param_groups and not (optimizer_state and target == Scheme.HF.value):
        raise click.UsageError("--param-groups goes with --to hf --optimizer-state")
    if target == PEFT:
        others = (dtype, max_shard_bytes, vocab_choice, drop, share_embeddings, adapter)
        if any((*others, optimizer_state, cs_backend, dry_run, saturate, resume)):
            raise click.UsageError("--to peft takes no options but --out, --config and --force")
        return _adapter(output, source, out or PEFT_OUT, config_file, force=force)
    if adapter and optimizer_state:
        raise click.UsageError(
            "--adapter does not go with --optimizer-state, which is of the weights before the merge"
        )
    scheme = Scheme(target)
    out = out or DEFAULT_OUT[target]
    with open_merged(
        source,
        adapter,
        config_file=config_file,
        vocab_choice=vocab_choice,
        drop=drop,
        with_optimizer=optimizer_state,
    ) as checkpoint:
        refuse_unmatched(drop, checkpoint.dropped)
        merged = checkpoint.adapter
        refuse_overlap(out, checkpoint.path, (*checkpoint.files, *(merged.files if merged else ())))
        carried = _carried(checkpoint, scheme, param_groups) if optimizer_state else None
        plan = make_plan(
            checkpoint,
            scheme,
            dtype or DEFAULT_DTYPE[target],
            max_shard_bytes=max_shard_bytes,
            share_embeddings=share_embeddings,
            saturate=saturate,
            continuation=carried,
            cs_backend=cs_backend,
        )
        beside = [checkpoint.folder / name for name in checkpoint.companions]
        last_id, vocab_size = last_token_id(beside), plan.config.vocab_size
        figures = {
            "output": str(out),
            "tensors": len(plan.weights),
            "source_bytes": plan.source_bytes,
            "target_bytes": plan.target_bytes,
            "disk_bytes": plan.disk_bytes,
            "planned_rss_bytes": conversion_memory(plan) + checkpoint.merging_memory,
        }
        output.note(
            f"{checkpoint.path} → {out}: {len(plan.weights)} tensors, "
            f"{plan.source_bytes / 1e9:.2f} GB → {plan.target_bytes / 1e9:.2f} GB {plan.dtype}"
        )
        if carried:
            figures["optimizer_step"] = carried.state.step
            output.note(f"with the optimizer's state after step {carried.state.step}")
            for text in decay_notes(plan.config, scheme, carried.grouping, carried.settings):
                output.note(f"note: {text}")
        if merged:
            figures["adapter"] = merged.describe()
            output.note(
                f"with {merged.folder} merged in float32: {len(merged.updates)} kernels updated, "
                f"{len(merged.replaced)} tensors replaced"
            )
            if (base := merged.settings.base) and not is_base(checkpoint, base):
                output.note(
                    f"note: the adapter was made for {base}; that {source} is this model, only its "
                    "shapes say"
                )
        if checkpoint.dropped:
            more = f" and {len(checkpoint.dropped) - 3} more" if checkpoint.dropped[3:] else ""
            output.note(f"note: dropped, as asked: {', '.join(checkpoint.dropped[:3])}{more}")
        if has_adapter(checkpoint):
            output.note("note: a run with LoRA: its kernels are written with the adapter merged")
        if last_id and last_id[0] >= vocab_size:
            output.note(
                f"note: {last_id[1]} has ids up to {last_id[0]}, the model only "
                f"{vocab_size} rows, 0 to {vocab_size - 1}"
            )
        for left_behind in not_carried(checkpoint):
            output.note(f"note: {left_behind}")
        if states_no_end(checkpoint):
            end = checkpoint.config.eos_token_id
            output.note(
                "note: no config.json or generation_config.json says where texts end: "
                + ("nothing ends them" if end is None else f"end-of-text does, token {end}")
            )
        if dry_run:
            output.note(
                f"needs {figures['disk_bytes'] / 1e9:.2f} GB of disk and "
                f"{figures['planned_rss_bytes'] / 1e9:.2f} GB of memory"
            )
            check_space(plan.disk_bytes, out)
            for move in plan.moves:
                output.data(
                    f"{move.source_name}  →  {move.target_name}  {move.stored_op.value}  "
                    f"{move.source.dtype} {list(move.source.shape)} → "
                    f"{move.target.dtype} {list(move.target.shape)}"
                )
            return figures
        if not checkpoint.companions:
            output.note("note: no tokenizer files beside the weights, so none are carried over")
        event = None
        events = execute(plan, checkpoint, out, force=force, resume=resume)
        try:
            with progress(output, "converting") as report, closing(events):
                for event in events:
                    if not isinstance(event, Result):
                        report(event.done, event.total, event.what)
        except BaseException as e:
            stopped = isinstance(e, KeyboardInterrupt | Terminated)
            if (event or stopped) and is_resumable(out):
                e.add_note("what is done is kept: the same command with --resume goes on")
            raise
    assert isinstance(event, Result), "the last event"
    result = event
    if result.kept_bytes:
        output.note(f"{result.kept_bytes / 1e9:.2f} GB were there already, and hold")
    for what, counts in (
        ("are NaN or infinite, and are kept", result.nonfinite),
        ("lie beyond the dtype's range, and became its largest", result.saturated),
    ):
        for name, count in counts.items():
            output.note(f"warning: {count} values of {name} {what}")
    note_memory(output, figures["planned_rss_bytes"])
    output.data(str(out))
    return figures | {
        "kept_bytes": result.kept_bytes,
        "nonfinite": result.nonfinite,
        "saturated": result.saturated,
    }


def _carried(checkpoint: Checkpoint, target: Scheme, param_groups: str | None) -> Continuation:
    from gptj_convert.optimizer.find import read_state
    from gptj_model.optimizer_names import GROUPINGS, Grouping
    from runner.training.run.continuation import continuation

    usual, *_ = GROUPINGS.get(target, (Grouping.ONE,))
    grouping = Grouping(param_groups) if param_groups else usual
    return continuation(checkpoint, read_state(checkpoint), grouping)


def _adapter(
    output: Output, source: Path, out: Path, config_file: Path | None, *, force: bool
) -> dict[str, Any]:
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.conversion.peft_adapter import write_adapter

    with open_checkpoint(source, config_file=config_file) as checkpoint:
        lora, base = write_adapter(checkpoint, out, force=force)
    output.note(
        f"{source} → {out}: the adapter of rank {lora.rank}, alpha {lora.alpha:g}, "
        f"for {', '.join(lora.targets)}"
    )
    if base is None:
        output.note(
            "note: the run does not say what it began from: base_model_name_or_path in "
            "adapter_config.json is null, and PeftModel.from_pretrained needs the model named"
        )
    output.data(str(out))
    return {
        "output": str(out),
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": lora.targets,
        "base": base,
    }


def _on_the_disk(output: Output, source: Path) -> Path:
    """The source, or where a repository of that name has been downloaded to."""
    from gptj_convert.hub.address import is_address, parse_address

    if source.exists():
        return source
    named = str(source)
    if not is_address(named):
        if source.parent.is_dir():
            return source
        try:
            parse_address(named)
        except UsageError:
            return source
        output.note(f"{source}: not found here, so it is taken for a repository of the hub")
    found = parse_address(named)
    folder = default_folder(found.repository)
    fetch_to(output, found.repository, found.revision, folder, for_conversion=True)
    return folder
