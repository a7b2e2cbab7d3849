"""records.json: fingerprints of the records that a run reads, kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from gptj_convert.files.whole_file import write_whole
from gptj_convert.formats.layouts.tf import RECORDS_FILE
from gptj_model.errors import FileFault
from runner.config.params import InputParams
from runner.data.reading.fingerprint import changes, fingerprints
from runner.data.reading.records import find_records

#: Fingerprint of each file by name, by the section that names its folder.
Fingerprints = Mapping[str, Mapping[str, str]]


def fingerprints_of(sections: Mapping[str, InputParams]) -> dict[str, dict[str, str]]:
    """Return the fingerprints of the records of each section.

    Raises:
        UsageError, DataFault: see `find_records`.
    """
    return {
        name: fingerprints(find_records(section.data_dir)) for name, section in sections.items()
    }


def changed_records(model_dir: Path, found: Fingerprints) -> Iterator[str]:
    """Yield in words how the records of each section differ from those of the run so far.

    Raises:
        FileFault: records.json is damaged.
    """
    before = _read(model_dir / RECORDS_FILE)
    for section, files in found.items():
        if section in before and (text := changes(before[section], files)):
            yield f"the records of {section} are not those that the run has read so far: {text}"


def keep_fingerprints(model_dir: Path, found: Fingerprints) -> None:
    """Write records.json; a section that is not read now keeps its fingerprints."""
    path = model_dir / RECORDS_FILE
    text = json.dumps({**_read(path), **found}, indent=1) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def _read(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
        return {section: dict(files) for section, files in values.items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise FileFault(
            f"{path}: is not JSON, expected the fingerprints of the run's records",
            hint="delete it: the run then trusts the records that it finds",
        ) from None
