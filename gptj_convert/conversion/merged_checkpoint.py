"""A checkpoint opened with an adapter merged into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gptj_convert.checkpoint.adapter_folder import open_adapter
from gptj_convert.checkpoint.merged_source import MergedSource
from gptj_convert.checkpoint.open import Checkpoint, open_checkpoint
from gptj_convert.conversion.origin import origin
from gptj_convert.conversion.plan import match
from gptj_convert.hub.download import read_record
from gptj_model.errors import ConfigError


def open_merged(
    path: Path,
    adapter: Path | None,
    *,
    config_file: Path | None = None,
    vocab_choice: str | None = None,
    drop: Sequence[str] = (),
    with_optimizer: bool = False,
) -> Checkpoint:
    """Open the checkpoint that `path` is or holds, with an adapter of the peft library merged.

    Args:
        path, config_file, vocab_choice, drop, with_optimizer: see `open_checkpoint`.
        adapter: folder of the adapter; None merges nothing.

    Raises:
        ConfigError, FileFault, TensorFault: as `open_checkpoint` and `open_adapter` raise them, or
            the adapter was made for another model.
    """
    checkpoint = open_checkpoint(
        path,
        config_file=config_file,
        vocab_choice=vocab_choice,
        drop=drop,
        with_optimizer=with_optimizer,
    )
    if adapter is None:
        return checkpoint
    try:
        names = {tensor: name for tensor, name, _ in match(checkpoint)}
        found = open_adapter(adapter, checkpoint.config)
        try:
            _refuse_another_base(checkpoint, adapter, found.settings.base)
        except BaseException:
            found.close()
            raise
    except BaseException:
        checkpoint.source.close()
        raise
    source = MergedSource(checkpoint.source, checkpoint.scheme, names, found)
    return replace(checkpoint, source=source, adapter=found)


def is_base(checkpoint: Checkpoint, base: str) -> bool | None:
    """Return whether a checkpoint is the model that an adapter names; None if that is not known.

    Args:
        checkpoint: model that the adapter is merged into.
        base: folder, or repository on the hub.
    """
    own, named = origin(checkpoint), Path(base)
    if named.is_dir():
        record = read_record(named)
        base = record.repository if record else str(named.resolve())
    if Path(own).is_absolute():
        return str(Path(own).resolve()) == base or None
    is_repository = base.count("/") == 1 and not named.is_absolute()
    return base.lower() == own.lower() if is_repository else None


def _refuse_another_base(checkpoint: Checkpoint, adapter: Path, base: str | None) -> None:
    if base and is_base(checkpoint, base) is False:
        raise ConfigError(
            f"{adapter}: was made for {base}, and {checkpoint.path} is {origin(checkpoint)}",
            hint=f"name its base: `gptj convert {base} --adapter {adapter} --to hf`; or change "
            "base_model_name_or_path in its adapter_config.json",
        )
