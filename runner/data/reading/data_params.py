"""data_params.json: the description of a folder of records by the run that wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.files.output_folder import sync
from gptj_convert.options import DATA_PARAMS_FILE
from gptj_model.errors import DataFault

#: Key of the facts of a shard, and of the shards that a merged folder holds.
SHARD, MERGED = "shard", "shards"
#: Pattern of the names of shards' folders.
SHARD_FOLDERS = "shard-*-of-*"


@dataclass(frozen=True, slots=True)
class RecordFileFacts:
    """Size, number of examples and digest of a record file when it was written."""

    bytes: int
    examples: int
    sha256: str


def read_params(folder: Path) -> dict[str, Any] | None:
    """Return arguments, sources, counts and files, or None without a valid file of this program."""
    try:
        values = json.loads((folder / DATA_PARAMS_FILE).read_text(encoding="utf-8"))
        for name in ("arguments", "counts", "sources"):
            values[name].items()
        _files(values)  # none, where a shard got nothing
        return values
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_params(folder: Path, values: Mapping[str, Any]) -> None:
    """Write data_params.json, and sync the file and its folder to the disk.

    Raises:
        OSError: the disk is full or not writable.
    """
    path = folder / DATA_PARAMS_FILE
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    sync(path)
    sync(folder)


def stated_files(folder: Path) -> dict[str, RecordFileFacts] | None:
    """Return the facts of each record file by name, or None without a file of this program.

    Raises:
        DataFault: data_params.json is cut or damaged.
    """
    if values := read_params(folder):
        return _files(values)
    path = folder / DATA_PARAMS_FILE
    if path.is_file():
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise DataFault(
                f"{path}: is not JSON, expected the description of the records",
                hint="make the records again, or delete this file to read them as they are",
            ) from None
    return None


def _files(values: dict[str, Any]) -> dict[str, RecordFileFacts]:
    return {
        name: RecordFileFacts(stated["bytes"], stated["examples"], stated["sha256"])
        for name, stated in values["files"].items()
    }
