"""The model card beside a source: its metadata and text, and what it says about the license."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptj_convert.files.file_name import is_license
from gptj_convert.formats.layouts.hf import CARD_FILE

#: Lines around what a conversion writes into a card; the next conversion replaces it.
BEGIN = "<!-- gptj: written by a conversion; the next one replaces it, up to the end mark -->"
END = "<!-- gptj: end -->"
#: Largest card that is read; those on the hub have some kilobytes.
_MAX_BYTES = 2**20
#: Field of the metadata with measured results, which hold for the very weights alone.
RESULTS = "model-index"


@dataclass(frozen=True, slots=True)
class SourceCard:
    """Model card beside a source, without what an earlier conversion wrote into it."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """Fields of its front matter."""
    text: str = ""
    fault: str | None = None
    """Why its metadata cannot be read."""
    license_files: tuple[str, ...] = ()
    """Names of the files beside it that hold licenses and notices."""

    @property
    def license(self) -> str | None:
        """License that the metadata names."""
        stated = self.metadata.get("license")
        names = stated if isinstance(stated, list) else [stated]
        return ", ".join(str(name) for name in names if name) or None

    @property
    def notes(self) -> list[str]:
        """What people should know before they publish a card that is made from this one."""
        notes: list[str] = []
        if self.fault:
            notes.append(f"{CARD_FILE}: its metadata is not kept: {self.fault}")
        if not self.license:
            found = f"; see {', '.join(self.license_files)}" if self.license_files else ""
            notes.append(
                f"the source's card names no license{found}: the written {CARD_FILE} names none; "
                "add one before you publish the model"
            )
        return notes


def read_card(folder: Path) -> SourceCard:
    """Return the model card in a folder, which is empty if there is none.

    Raises:
        OSError: reading fails.
    """
    licenses = tuple(sorted(p.name for p in folder.iterdir() if p.is_file() and is_license(p.name)))
    path = folder / CARD_FILE
    if not path.is_file():
        return SourceCard(license_files=licenses)
    if path.stat().st_size > _MAX_BYTES:
        fault = f"it has {path.stat().st_size} bytes, expected at most {_MAX_BYTES}"
        return SourceCard(fault=fault, license_files=licenses)
    try:
        content = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        return SourceCard(fault=f"it is not UTF-8: {e}", license_files=licenses)
    metadata, text, fault = _split(content)
    return SourceCard(metadata, _without_ours(text), fault, licenses)


def carried_document(path: Path) -> bytes:
    """Return a license or a model card as conversions and runs carry it: bit for bit, but without
    what an earlier conversion wrote about the folder that it was in.

    Raises:
        OSError: reading fails.
    """
    content = path.read_bytes()
    ours = path.name == CARD_FILE and len(content) <= _MAX_BYTES and BEGIN.encode() in content
    if not ours:
        return content
    before, _, rest = content.partition(BEGIN.encode())
    _, end, after = rest.partition(END.encode())
    return before.rstrip() + b"\n\n" + after.lstrip() if end else content


def _split(content: str) -> tuple[dict[str, Any], str, str | None]:
    """Return metadata and text of a card, and why the metadata cannot be read."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError, YAMLWarning

    block = REGEX_YAML_BLOCK.search(content)
    if not block:
        return {}, content, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", YAMLWarning)  # of odd YAML that is valid
            metadata = YAML(typ="safe", pure=True).load(block[2])
    except (YAMLError, ValueError, TypeError, AttributeError, RecursionError) as e:
        return {}, content, f"it is not valid YAML: {' '.join(str(e).split())[:200]}"
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        return {}, content, "it is not a mapping of names"
    return metadata, content[block.end() :], None


def _without_ours(text: str) -> str:
    """Return a text without what an earlier conversion wrote."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before.strip()}\n\n{after.strip()}".strip() if begin and end else text.strip()
