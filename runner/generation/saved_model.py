"""A model as a TensorFlow SavedModel, in a folder that appears complete or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.execute import check_space
from gptj_convert.files.output_folder import output_folder, refuse_existing
from gptj_convert.resources import footprint, machine
from gptj_convert.streams.progress import Progress, Work
from gptj_model.config import CONFIG_FILE
from gptj_model.dtypes import NUMPY
from gptj_model.errors import GptjError
from gptj_model.tensors import table

if TYPE_CHECKING:
    from gptj_model.network.model import GPTJ

#: Folder of a SavedModel for files that TensorFlow does not read, as its convention has it.
EXTRA = "assets.extra"
#: Stages of an export beside the loading of weights.
_TRACED, _WRITTEN = "graphs", "variables"


def weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the size of the SavedModel's variables in bytes."""
    return NUMPY[dtype].itemsize * sum(t.size for t in table(checkpoint.config))


def refuse_impossible(checkpoint: Checkpoint, out: Path, dtype: str, *, force: bool) -> int:
    """Check before any weight is read that the export can be made, and return the memory in bytes
    that it takes.

    Raises:
        UsageError: `out` exists, and `force` is off.
        FileFault: the disk is too small.
        GptjError: the machine's memory is too small.
    """
    refuse_existing(out, force=force)
    check_space(weight_bytes(checkpoint, dtype), out)
    needed = footprint.export_memory(checkpoint.config, dtype)
    if needed > (total := machine.memory_total()):
        smaller = [name for name in NUMPY if NUMPY[name].itemsize < NUMPY[dtype].itemsize]
        hint = f"take a machine with {needed / 1e9:.0f} GB"
        if "bfloat16" in smaller:
            hint = f"{hint}, or halve it with --dtype bfloat16"
        raise GptjError(
            f"the export holds all weights in {dtype} and needs {needed / 1e9:.2f} GB of memory, "
            f"and this machine has {total / 1e9:.2f} GB",
            hint=hint,
        )
    return needed


def write_saved_model(
    model: GPTJ,
    checkpoint: Checkpoint,
    out: Path,
    *,
    ends: Sequence[int],
    longest: int,
    force: bool,
) -> Work[None]:
    """Write a SavedModel with the signatures of `gptj_model.serving.served_model.ServedModel`.

    Args:
        model: model in memory.
        checkpoint: checkpoint that it was loaded from, whose tokenizer is copied.
        out: folder to write.
        ends: token ids that each end a text.
        longest: largest number of tokens of a prompt with its continuation.
        force: whether to overwrite an existing folder.

    Raises:
        UsageError: `out` exists, and `force` is off.
        OSError: the disk is full or not writable.
    """
    from gptj_model.serving.served_model import save, traced

    with output_folder(out, force=force) as staging:
        served = traced(model, ends, longest)
        yield Progress(1, 2, _TRACED)
        save(served, staging.content)
        _copy_extra(model, checkpoint, staging.content / EXTRA)
        yield Progress(2, 2, _WRITTEN)


def _copy_extra(model: GPTJ, checkpoint: Checkpoint, folder: Path) -> None:
    folder.mkdir()
    config = json.dumps(model.config.to_hf(dtype=model.compute_dtype), indent=2) + "\n"
    (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    for name in checkpoint.companions:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, folder / name)
