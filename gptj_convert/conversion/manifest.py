"""manifest.json: the origin of a converted checkpoint, and the hash of every part of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.conversion.lineage import Lineage
from gptj_convert.conversion.plan import Plan
from gptj_convert.files.digest import SHA256, digest
from gptj_convert.files.file_name import is_inner_path
from gptj_convert.formats.layouts.hf import CARD_FILE
from gptj_convert.hub.download import read_record
from gptj_convert.settings.params_yaml import PARAMS_FILE
from gptj_convert.settings.trainer_yaml import TRAINER_FILE
from gptj_model import __version__
from gptj_model.errors import FileFault

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
#: Files that are meant to be edited, and are therefore not hashed.
EDITED_FILES = (PARAMS_FILE, TRAINER_FILE, CARD_FILE)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of a manifest.json. It holds no time, so the same source gives the same file."""

    source: Mapping[str, Any]
    """path, format, size in bytes of each file, `vocab_size` (`Checkpoint.vocab_choice`) and, where
    they apply, names of `dropped` tensors and the merged `adapter` (`PeftAdapter.describe`)."""
    target: Mapping[str, Any]
    """Format and dtype."""
    files: Mapping[str, Mapping[str, Any]]
    """Size and SHA-256 of each output file that is not meant to be edited."""
    tensors: Mapping[str, Mapping[str, Any]]
    """crc32c in hex of the source's bytes and of the result's, by HF name."""
    origin: Mapping[str, Any] | None = None
    """`Lineage.to_values` of the result, where something is known."""
    tool: Mapping[str, str] = field(
        default_factory=lambda: {"name": "gptj", "version": __version__}
    )
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the text of the file."""
        values = asdict(self)
        if not self.origin:
            del values["origin"]
        return json.dumps(values, indent=1, sort_keys=True) + "\n"

    @property
    def lineage(self) -> Lineage:
        """What is recorded about the model that the result is or was made from."""
        return Lineage.from_values(self.origin or {})

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Return the manifest in a folder, or None if there is none.

        Raises:
            FileFault: the file is not a manifest.
        """
        path = folder / MANIFEST_FILE
        try:
            manifest = cls(**json.loads(path.read_text(encoding="utf-8")))
            _check(manifest)
            return manifest
        except FileNotFoundError:
            return None
        except _NOT_A_MANIFEST as e:
            raise FileFault(f"{path}: is not a manifest of this program: {e}") from None


_NOT_A_MANIFEST = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _check(manifest: Manifest) -> None:
    """Raise one of `_NOT_A_MANIFEST` unless files and tensors are described correctly."""
    manifest.source.items()
    Lineage.from_values(manifest.origin or {})
    for name, stated in manifest.files.items():
        if not is_inner_path(name) or type(stated["bytes"]) is not int:
            raise ValueError(f"entry {name!r} is not a file with its size")
        if not re.fullmatch("[0-9a-f]{64}", stated["sha256"]):
            raise ValueError(f"SHA-256 of {name!r} is not 64 hexadecimal digits")
    for name, stated in manifest.tensors.items():
        checksums = stated["crc32c"], stated.get("source_crc32c", stated["crc32c"])
        if not all(re.fullmatch("[0-9a-f]{8}", crc) for crc in checksums):
            raise ValueError(f"crc32c of {name!r} is not 8 hexadecimal digits")


def describe_source(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the manifest's entry about the source, with the hub's digests where they are known."""
    record = read_record(checkpoint.folder)
    files: dict[str, dict[str, Any]] = {}
    for path in checkpoint.files:
        files[path.name] = {"bytes": path.stat().st_size}
        stated = record.files.get(path.name) if record else None
        if stated and stated.kind == SHA256:
            files[path.name]["sha256"] = stated.hex
    choices: dict[str, Any] = {}
    if checkpoint.dropped:
        choices["dropped"] = list(checkpoint.dropped)
    if checkpoint.adapter:
        choices["adapter"] = checkpoint.adapter.describe()
    return {
        "path": str(checkpoint.path.absolute()),
        "format": checkpoint.scheme.value,
        "vocab_size": checkpoint.vocab_choice,
        "files": files,
        **choices,
    }


def describe_target(plan: Plan) -> dict[str, Any]:
    """Return the manifest's entry about the output."""
    target: dict[str, Any] = {
        "format": plan.scheme.value,
        "dtype": plan.dtype,
        "share_embeddings": plan.shares_embeddings,
        "saturate": plan.saturate,
    }
    if plan.continuation:
        target["optimizer_step"] = plan.continuation.state.step
    return target


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}
