"""The model that a run started from, as peft and transformers would load it, and the lineage of a
checkpoint's weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.lineage import FINETUNE, Lineage
from gptj_convert.conversion.manifest import Manifest
from gptj_convert.conversion.plan import Plan
from gptj_convert.conversion.training_data import training_data
from gptj_convert.formats.layouts.cs import CsSource
from gptj_convert.hub.address import is_repository
from gptj_convert.hub.download import read_record
from gptj_model.config import CONFIG_FILE
from gptj_model.dtypes import is_lossless
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, read_tensor
from gptj_model.tensors import GLOBAL_STEP, LORA_ALPHA, Scheme

#: Key of the origin in a config.json of transformers.
ORIGIN_KEY = "_name_or_path"


def origin(checkpoint: Checkpoint) -> str:
    """Return the repository or folder of a checkpoint's weights; for a converted checkpoint that of
    its source, which is the same model in the format that others load."""
    folder = checkpoint.folder
    if checkpoint.scheme is not Scheme.HF:
        try:
            manifest = Manifest.read(folder)
        except FileFault:  # verification reports it
            manifest = None
        source = manifest.source if manifest else {}
        if source.get("format") == Scheme.HF.value and "adapter" not in source:
            folder = Path(str(source.get("path")))
            folder = folder if folder.is_dir() else folder.parent
    record = read_record(folder)
    return record.repository if record else str(folder.absolute())


def stated_origin(folder: Path) -> str | None:
    """Return the origin that a run's config.json states, or None."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = values.get(ORIGIN_KEY) if isinstance(values, dict) else None
    return found if isinstance(found, str) and found else None


def lineage(checkpoint: Checkpoint) -> Lineage:
    """Return what is recorded about the origin of a checkpoint's weights: by the download of its
    folder, by the conversion that wrote it, or by the run that trained it."""
    if record := read_record(checkpoint.folder):
        return Lineage(repository=record.repository, commit=record.commit)
    try:
        manifest = Manifest.read(checkpoint.folder)
    except FileFault:  # verification reports it
        manifest = None
    if manifest and {p.name for p in checkpoint.files} <= manifest.files.keys():
        return manifest.lineage
    if not (step := _step(checkpoint)):
        return Lineage()
    base = stated_origin(checkpoint.folder)
    return Lineage(
        repository=base if base and is_repository(base) else None,
        relation=FINETUNE,
        step=step,
        **training_data(checkpoint.files[0]),
    )


def result_lineage(checkpoint: Checkpoint, plan: Plan) -> Lineage:
    """Return the lineage of the result of a conversion."""
    return lineage(checkpoint).altered(
        trained=bool(checkpoint.adapter) or has_adapter(checkpoint),
        rounded=any(
            not is_lossless(checkpoint.stored_dtype(m.source_name), m.target.dtype)
            for m in plan.weights
        ),
    )


def has_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is of a run with LoRA."""
    return checkpoint.scheme is Scheme.TF and LORA_ALPHA in checkpoint.source.tensors


def _step(checkpoint: Checkpoint) -> int:
    """Return the step of a run's checkpoint, or 0 for weights that no run trained."""
    source = checkpoint.source
    if isinstance(source, CsSource):
        try:
            step = source.number(GLOBAL_STEP) or 0
        except FileFault:  # only the optimizer needs it, and reports it
            step = 0
        return int(step) if math.isfinite(step) else 0
    info = source.tensors.get(GLOBAL_STEP) if checkpoint.scheme is Scheme.TF else None
    return int(read_tensor(source, GLOBAL_STEP)) if info == TensorInfo("int64", ()) else 0
