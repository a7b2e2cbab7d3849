"""The data that a run was trained on, as its params.yaml and the records beside it state it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypedDict

from gptj_convert.hub.download import read_record
from gptj_convert.hub.listing import DATA_SET
from gptj_convert.options import DATA_PARAMS_FILE
from gptj_convert.settings.params_yaml import params_beside, read_yaml
from gptj_model.errors import ConfigError

#: Folders above a source of records that may be the download of its data set.
_FOLDERS_ABOVE = 3


class TrainingData(TypedDict, total=False):
    """Fields of `Lineage` about a run's data."""

    records: tuple[str, ...]
    data_sets: tuple[str, ...]


def training_data(checkpoint: Path) -> TrainingData:
    """Return the data that the run of a checkpoint read, by names alone; what cannot be read is
    left out.

    Args:
        checkpoint: a file of the run's checkpoint.
    """
    path = params_beside(checkpoint)
    try:
        section = read_yaml(path).get("train_input") if path else None
    except ConfigError:
        section = None
    stated = section.get("data_dir") if isinstance(section, dict) else None
    folders = [f for f in (stated if isinstance(stated, list) else [stated]) if isinstance(f, str)]
    data_sets = {name for folder in folders for name in _data_sets(Path(folder))}
    return {
        "records": tuple(PurePosixPath(folder).name for folder in folders),
        "data_sets": tuple(sorted(data_sets)),
    }


def _data_sets(folder: Path) -> Iterator[str]:
    """Yield the repositories that the sources of a folder of records were downloaded from."""
    try:
        values = json.loads((folder / DATA_PARAMS_FILE).read_text(encoding="utf-8"))
        sources = [Path(source) for source in values["sources"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for above in {p for source in sources for p in list(source.parents)[:_FOLDERS_ABOVE]}:
        record = read_record(above)
        if record and record.kind == DATA_SET:
            yield record.repository
