"""`gptj convert`: write a checkpoint in another format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from runner.cli.shared.command import command, note_memory
from runner.cli.shared.fetching import default_folder, fetch_to
from runner.cli.shared.option_rules import OptionRules
from runner.cli.shared.options import (
    CHECKPOINT,
    PATH,
    config_option,
    force_option,
    max_shard_size_option,
    out_option,
    resume_option,
)
from runner.cli.shared.output import Output
from runner.cli.shared.progress import follow

if TYPE_CHECKING:
    from gptj_convert.checkpoint.open import Checkpoint
    from gptj_convert.conversion.execute import Result
    from gptj_convert.conversion.plan import Plan
    from gptj_convert.optimizer.target import Continuation
    from gptj_model.tensors import Scheme

_MODEL = (
    "--dtype", "--vocab-size", "--drop", "--share-embeddings", "--adapter", "--optimizer-state",
    "--dry-run", "--saturate", "--resume",
)  # fmt: skip
RULES = OptionRules(
    mode=lambda values: f"--to {values['target']}",
    takes={
        "--to tf": _MODEL,
        "--to hf": (*_MODEL, "--max-shard-size", "--param-groups"),
        "--to keras": _MODEL,
        "--to cs": (*_MODEL, "--cs-backend"),
        "--to peft": (),
    },
    needs={"--param-groups": "--optimizer-state"},
    exclusive=(("--resume", "--force"), ("--adapter", "--optimizer-state")),
)


@command(
    "gptj convert --to tf",
    "gptj convert me/my-gpt-j --to tf --dtype bfloat16 --out my-gpt-j-tf",
    "gptj convert model_dir --to hf --max-shard-size 2GB",
    rules=RULES,
)
@click.argument("source", metavar="[SRC]", type=CHECKPOINT, required=False)
@click.option(
    "--to",
    "target",
    type=click.Choice([*DEFAULT_OUT, PEFT]),
    required=True,
    help="Format to write; peft is the LoRA adapter of a run alone.",
)
@out_option(default_text=", ".join(str(folder) for folder in (*DEFAULT_OUT.values(), PEFT_OUT)))
@click.option(
    "--dtype",
    type=click.Choice([*DTYPES, KEEP]),
    help="Dtype of the output; keep leaves every tensor as it is.  "
    "[default: float32 for tf, else keep]",
)
@max_shard_size_option
@click.option(
    "--vocab-size",
    "vocab_choice",
    type=click.Choice(VOCAB_SIZES),
    help="Which vocabulary size counts where config.json and the tensors disagree.  "
    "[default: a disagreement is an error]",
)
@click.option(
    "--drop",
    multiple=True,
    metavar="NAME",
    help="Drop a tensor that is not part of GPT-J, such as v_head.weight or 'v_head.*'; can be "
    "given several times.",
)
@click.option(
    "--share-embeddings", is_flag=True, help="Drop an output head that equals the embedding."
)
@click.option(
    "--adapter", type=PATH, help="Folder of a LoRA adapter (peft format) to merge into SRC."
)
@click.option(
    "--optimizer-state",
    is_flag=True,
    help="Also convert the state of AdamW: moments, step, beta powers and loss scale.",
)
@click.option(
    "--param-groups",
    type=click.Choice(GROUPINGS),
    help="Parameter groups of optimizer.pt: one (model.parameters()), or decay (weights with "
    "weight decay first, as transformers' Trainer groups them).  [default: one]",
)
@click.option(
    "--cs-backend",
    type=click.Choice(CS_BACKENDS),
    help="Backend named in trainer.yaml: the CS system, or this machine's CPU.  [default: CSX]",
)
@config_option
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@click.option(
    "--saturate",
    is_flag=True,
    help="Replace values beyond the range of the dtype by its largest value.",
)
@resume_option
@force_option
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
    .mdl file of the CS client, or the prefix of a TensorFlow checkpoint; or a model on the hub
    (OWNER/NAME, OWNER/NAME@REVISION or the address of its page), which is downloaded to ./NAME
    first.

    A run with LoRA is written with its adapter merged; `--to peft` writes the adapter alone, for
    the peft library. `--adapter DIR` merges an adapter of that library into SRC, as
    `merge_and_unload` does in float32.

    Licenses and the model card of SRC are carried; `--to hf` and `--to peft` write README.md, the
    card of the result.
    """
    from gptj_convert.conversion.cost import conversion_memory
    from gptj_convert.conversion.execute import check_space, execute, is_resumable

    source = _local(output, source or DEFAULT_SOURCE)
    if target == PEFT:
        return _write_adapter(output, source, out or PEFT_OUT, config_file, force=force)
    out = out or DEFAULT_OUT[target]
    with planned(
        source,
        target,
        out,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        vocab_choice=vocab_choice,
        drop=drop,
        share_embeddings=share_embeddings,
        adapter=adapter,
        optimizer_state=optimizer_state,
        param_groups=param_groups,
        cs_backend=cs_backend,
        config_file=config_file,
        saturate=saturate,
    ) as (checkpoint, plan):
        figures: dict[str, Any] = {
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
        if plan.continuation:
            figures["optimizer_step"] = plan.continuation.state.step
        if checkpoint.adapter:
            figures["adapter"] = checkpoint.adapter.describe()
        note_plan(output, checkpoint, plan)
        if dry_run:
            check_space(plan.disk_bytes, out)
            _show_plan(output, plan, figures)
            return figures
        note_companions(output, checkpoint)
        work = execute(plan, checkpoint, out, force=force, resume=resume)
        result = follow(output, "converting", work, resumable=lambda: is_resumable(out))
    note_result(output, result)
    note_memory(output, figures["planned_rss_bytes"])
    output.data(str(out))
    return figures | {
        "kept_bytes": result.kept_bytes,
        "nonfinite": result.nonfinite,
        "saturated": result.saturated,
    }


@contextmanager
def planned(
    source: Path,
    target: str,
    out: Path | None,
    *,
    dtype: str | None,
    max_shard_bytes: int | None,
    vocab_choice: str | None,
    drop: Sequence[str],
    share_embeddings: bool,
    adapter: Path | None,
    optimizer_state: bool,
    param_groups: str | None,
    cs_backend: str | None,
    config_file: Path | None,
    saturate: bool,
) -> Iterator[tuple[Checkpoint, Plan]]:
    """Yield the open source and the plan of its conversion.

    Args:
        source: checkpoint to convert.
        target: key of `options.DEFAULT_OUT`.
        out: folder that will be written; None if only the plan is wanted.
        dtype, max_shard_bytes, share_embeddings, cs_backend, saturate: see `make_plan`; a dtype of
            None is the format's default.
        vocab_choice, drop, adapter, config_file: see `open_merged`.
        optimizer_state: whether to carry over the state of the optimizer.
        param_groups: one of `options.GROUPINGS`; None is the usual one of the format.

    Raises:
        GptjError: as `open_merged`, `refuse_overlap` and `make_plan` raise it.
    """
    from gptj_convert.checkpoint.source_names import refuse_unmatched
    from gptj_convert.conversion.merged_checkpoint import open_merged
    from gptj_convert.conversion.plan import make_plan
    from gptj_convert.files.output_folder import refuse_overlap
    from gptj_model.tensors import Scheme

    scheme = Scheme(target)
    with open_merged(
        source,
        adapter,
        config_file=config_file,
        vocab_choice=vocab_choice,
        drop=drop,
        with_optimizer=optimizer_state,
    ) as checkpoint:
        refuse_unmatched(drop, checkpoint.dropped)
        if out is not None:
            merged = checkpoint.adapter.files if checkpoint.adapter else ()
            refuse_overlap(out, checkpoint.path, (*checkpoint.files, *merged))
        carried = _optimizer_state(checkpoint, scheme, param_groups) if optimizer_state else None
        yield (
            checkpoint,
            make_plan(
                checkpoint,
                scheme,
                dtype or DEFAULT_DTYPE[target],
                max_shard_bytes=max_shard_bytes,
                share_embeddings=share_embeddings,
                saturate=saturate,
                continuation=carried,
                cs_backend=cs_backend,
            ),
        )


def _optimizer_state(
    checkpoint: Checkpoint, target: Scheme, param_groups: str | None
) -> Continuation:
    from gptj_convert.optimizer.find import read_state
    from gptj_model.optimizer_names import GROUPINGS, Grouping
    from runner.training.run.continuation import continuation

    usual, *_ = GROUPINGS.get(target, (Grouping.ONE,))
    grouping = Grouping(param_groups) if param_groups else usual
    return continuation(checkpoint, read_state(checkpoint), grouping)


def note_plan(output: Output, checkpoint: Checkpoint, plan: Plan) -> None:
    """Note what a conversion carries over, merges, drops and ignores."""
    if plan.continuation:
        from gptj_convert.optimizer.decay import decay_notes

        carried = plan.continuation
        output.note(f"with the optimizer state after step {carried.state.step}")
        for text in decay_notes(plan.config, plan.scheme, carried.grouping, carried.settings):
            output.note(f"note: {text}")
    if checkpoint.adapter:
        _note_adapter(output, checkpoint)
    _note_source(output, checkpoint, plan)


def note_companions(output: Output, checkpoint: Checkpoint) -> None:
    """Note that there are no tokenizer files to carry over, if there are none."""
    if not checkpoint.companions:
        output.note("note: no tokenizer files beside the weights, so none are carried over")


def _note_adapter(output: Output, checkpoint: Checkpoint) -> None:
    """Note the adapter that is merged, and whether the source is known to be its base model."""
    from gptj_convert.conversion.merged_checkpoint import is_base

    merged = checkpoint.adapter
    assert merged
    output.note(
        f"with {merged.folder} merged in float32: {len(merged.updates)} kernels updated, "
        f"{len(merged.replaced)} tensors replaced"
    )
    if (base := merged.settings.base) and not is_base(checkpoint, base):
        output.note(
            f"note: the adapter was made for {base}; only the shapes show that {checkpoint.path} "
            "is this model"
        )


def _note_source(output: Output, checkpoint: Checkpoint, plan: Plan) -> None:
    """Note what of the source is dropped, merged, ignored or missing."""
    from gptj_convert.conversion.execute import not_carried, states_no_end
    from gptj_convert.conversion.model_card import card_notes
    from gptj_convert.conversion.peft_adapter import has_adapter
    from gptj_convert.formats.layouts.gpt2_tokenizer import last_token_id
    from gptj_model.tensors import Scheme

    if checkpoint.dropped:
        more = f" and {len(checkpoint.dropped) - 3} more" if checkpoint.dropped[3:] else ""
        output.note(f"note: dropped, as asked: {', '.join(checkpoint.dropped[:3])}{more}")
    if has_adapter(checkpoint):
        output.note("note: a run with LoRA: its kernels are written with the adapter merged")
    beside = [checkpoint.folder / name for name in checkpoint.companions]
    last_id, vocab_size = last_token_id(beside), plan.config.vocab_size
    if last_id and last_id[0] >= vocab_size:
        output.note(
            f"note: {last_id[1]} has ids up to {last_id[0]}, but the model has only "
            f"{vocab_size} rows, 0 to {vocab_size - 1}"
        )
    for left_behind in not_carried(checkpoint):
        output.note(f"note: {left_behind}")
    if plan.scheme is Scheme.HF:
        for text in card_notes(checkpoint, plan):
            output.note(f"note: {text}")
    if states_no_end(checkpoint):
        end = checkpoint.config.eos_token_id
        output.note(
            "note: no config.json or generation_config.json says where texts end: "
            + ("nothing ends them" if end is None else f"end-of-text does, token {end}")
        )


def _show_plan(output: Output, plan: Plan, figures: Mapping[str, Any]) -> None:
    output.note(
        f"needs {figures['disk_bytes'] / 1e9:.2f} GB of disk and "
        f"{figures['planned_rss_bytes'] / 1e9:.2f} GB of memory"
    )
    for move in plan.moves:
        output.data(
            f"{move.source_name}  →  {move.target_name}  {move.stored_op.value}  "
            f"{move.source.dtype} {list(move.source.shape)} → "
            f"{move.target.dtype} {list(move.target.shape)}"
        )


def note_result(output: Output, result: Result) -> None:
    """Note what was reused, and values that are not finite or were replaced."""
    if result.kept_bytes:
        output.note(
            f"reused {result.kept_bytes / 1e9:.2f} GB of the interrupted run (checksums match)"
        )
    for what, counts in (
        ("are NaN or infinite, and are kept", result.nonfinite),
        ("lay beyond the dtype's range, and became its largest value", result.saturated),
    ):
        for name, count in counts.items():
            output.note(f"warning: {count} values of {name} {what}")


def _write_adapter(
    output: Output, source: Path, out: Path, config_file: Path | None, *, force: bool
) -> dict[str, Any]:
    from gptj_convert.checkpoint.open import open_checkpoint
    from gptj_convert.conversion.peft_adapter import write_adapter
    from gptj_convert.conversion.source_card import read_card

    with open_checkpoint(source, config_file=config_file) as checkpoint:
        lora, base = write_adapter(checkpoint, out, force=force)
        notes = read_card(checkpoint.folder).notes
    output.note(
        f"{source} → {out}: the adapter of rank {lora.rank}, alpha {lora.alpha:g}, "
        f"for {', '.join(lora.targets)}"
    )
    if base is None:
        output.note(
            "note: the run does not say which model it started from: base_model_name_or_path in "
            "adapter_config.json is null, so PeftModel.from_pretrained needs the model named"
        )
    for text in notes:
        output.note(f"note: {text}")
    output.data(str(out))
    return {
        "output": str(out),
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": lora.targets,
        "base": base,
    }


def _local(output: Output, source: Path) -> Path:
    """Return the source, or the folder that a repository of that name is downloaded to."""
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
        output.note(f"{source}: not found here, so it is taken as a repository on the hub")
    found = parse_address(named)
    folder = default_folder(found.repository)
    fetch_to(output, found.repository, found.revision, folder, for_conversion=True)
    return folder
