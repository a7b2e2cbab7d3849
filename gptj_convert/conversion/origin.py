"""The model that a run started from, as peft and transformers would load it."""

from __future__ import annotations

import json
from pathlib import Path

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.manifest import Manifest
from gptj_convert.hub.download import read_record
from gptj_model.config import CONFIG_FILE
from gptj_model.errors import FileFault
from gptj_model.tensors import Scheme

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
