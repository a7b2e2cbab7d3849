"""data_params.json: what a folder of records holds, as the run that wrote it noted it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_model.errors import DataFault

PARAMS_FILE = "data_params.json"


@dataclass(frozen=True, slots=True)
class StatedFile:
    """A record file as it was when it was written."""

    bytes: int
    examples: int
    sha256: str


def read_params(folder: Path) -> dict[str, Any] | None:
    """Arguments, sources, counts and files; None when there are none of this program's."""
    try:
        values = json.loads((folder / PARAMS_FILE).read_text(encoding="utf-8"))
        whole = values["arguments"].items() and values["counts"].items() and values["sources"]
        return values if _files(values) and whole is not None else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def stated_files(folder: Path) -> dict[str, StatedFile] | None:
    """The record files by name; None where nothing was noted, or not by this program.

    Raises:
        DataFault: what was noted is cut or damaged.
    """
    if values := read_params(folder):
        return _files(values)
    path = folder / PARAMS_FILE
    if path.is_file():
        try:
            json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise DataFault(
                f"{path}: is not JSON, expected what the records' maker noted of them",
                hint="make the records anew; without this file they are read as they are",
            ) from None
    return None


def _files(values: dict[str, Any]) -> dict[str, StatedFile]:
    return {
        name: StatedFile(stated["bytes"], stated["examples"], stated["sha256"])
        for name, stated in values["files"].items()
    }
