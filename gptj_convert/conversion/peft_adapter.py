"""The adapter of a run with LoRA, as a folder that the peft library loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from gptj_convert.checkpoint.adapter_folder import CONFIG_FILE, WEIGHTS_FILES
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.model_card import adapter_card
from gptj_convert.conversion.origin import has_adapter, stated_origin
from gptj_convert.conversion.plan import match
from gptj_convert.files.output_folder import output_folder, refuse_overlap
from gptj_convert.formats.containers.safetensors import safetensors_file
from gptj_convert.formats.layouts.hf import CARD_FILE
from gptj_model.errors import UsageError
from gptj_model.lora import Lora, peft_config, stored_lora
from gptj_model.source import TensorInfo, raw_bytes, read_tensor
from gptj_model.tensors import LORA_ALPHA, Scheme, Tensor

WEIGHTS_FILE = WEIGHTS_FILES[0]


def write_adapter(checkpoint: Checkpoint, out: Path, *, force: bool) -> tuple[Lora, str | None]:
    """Write the adapter to `out`, which appears when it is complete; return the adapter and its
    base.

    Args:
        checkpoint: checkpoint of a run with LoRA.
        out: folder to write.
        force: whether to overwrite an existing folder.

    Raises:
        UsageError: the checkpoint has no adapter, or `out` exists and `force` is off.
        TensorFault: see `match`.
        FileFault, OSError: reading or writing fails.
    """
    if not has_adapter(checkpoint):
        raise UsageError(
            f"{checkpoint.path}: holds no adapter, expected a checkpoint of a run with model.lora",
            hint="`gptj convert … --to hf` writes the whole model",
        )
    refuse_overlap(out, checkpoint.path, checkpoint.files)
    match(checkpoint)
    source, config = checkpoint.source, checkpoint.config
    shapes = {name: info.shape for name, info in source.tensors.items()}
    lora = stored_lora(config, shapes, float(read_tensor(source, LORA_ALPHA)))
    rows = {row.hf: row for pair in lora.rows(config).values() for row in pair}
    infos = {name: TensorInfo("float32", row.shape) for name, row in rows.items()}
    base = stated_origin(checkpoint.folder)
    # transformers' own files also name the library whose layout they have.
    layout = safetensors_file(WEIGHTS_FILE, infos, {"format": "pt"})
    with output_folder(out, force=force) as staging:
        with (staging.content / WEIGHTS_FILE).open("wb") as f:
            for part in layout.parts:
                f.write(part if isinstance(part, bytes) else _values(checkpoint, rows[part]))
        text = json.dumps(peft_config(lora, base), indent=2) + "\n"
        (staging.content / CONFIG_FILE).write_text(text, encoding="utf-8")
        for name in checkpoint.documents:
            shutil.copyfile(checkpoint.folder / name, staging.content / name)
        card = adapter_card(checkpoint, lora)
        (staging.content / CARD_FILE).write_text(card, encoding="utf-8")
    return lora, base


def _values(checkpoint: Checkpoint, row: Tensor) -> memoryview:
    values = row.op(Scheme.TF, Scheme.HF)(read_tensor(checkpoint.source, row.tf))
    return raw_bytes(np.ascontiguousarray(values, np.float32))
