"""Atomic writes of small files: readers see the old content or the new content."""

from __future__ import annotations

import os
from pathlib import Path

from gptj_convert.files.output_folder import sync

#: Prefix of the name of a file that is being written.
PARTIAL = ".partial-"


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the content of a small file atomically and durably.

    Raises:
        OSError: the disk is full or not writable.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        with partial.open("wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        partial.rename(path)
        sync(path.parent)
    except OSError as e:
        e.filename = str(path)  # the calls know only the partial file or a descriptor
        partial.unlink(missing_ok=True)
        raise
