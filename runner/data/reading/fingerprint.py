"""Fingerprints of record files, which tell a resumed run that its data has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from crc32c import crc32c

from runner.data.reading.data_params import stated_files

#: Number and size in bytes of the pieces of a file that are read where no digest is stated.
_PIECES = 16
_PIECE = 1 << 16


def fingerprints(paths: Sequence[Path]) -> dict[str, str]:
    """Return a fingerprint of each record file by its name.

    It is the SHA-256 that data_params.json states or, without one, the size and a checksum of
    16 pieces of 64 KiB, spread over the file; up to 1 MiB that is all of it. Folders do not count:
    the same files elsewhere are the same data.

    Args:
        paths: record files that were found and checked.

    Raises:
        OSError: a file cannot be read.
    """
    stated = {folder: stated_files(folder) or {} for folder in {p.parent for p in paths}}
    found: dict[str, str] = {}
    for path in paths:
        facts = stated[path.parent].get(path.name)
        name = path.name if path.name not in found else str(path)
        found[name] = f"sha256:{facts.sha256}" if facts else _sampled(path)
    return found


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return in words which files differ between two results of `fingerprints`, or None."""
    groups = {
        "changed": [name for name in now if name in before and now[name] != before[name]],
        "new": [name for name in now if name not in before],
        "missing": [name for name in before if name not in now],
    }
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if names[3:] else ''})"
        for what, names in groups.items()
        if names
    ]
    return ", ".join(parts) or None


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    checksum = 0
    with path.open("rb") as f:
        for n in range(_PIECES):
            f.seek(max(size - _PIECE, 0) * n // (_PIECES - 1))
            checksum = crc32c(f.read(_PIECE), checksum)
    return f"sampled:{size}:{checksum:08x}"
