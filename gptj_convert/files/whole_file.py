"""Small files that have their old content or their new one, and nothing between."""

from __future__ import annotations

import os
from pathlib import Path

from gptj_convert.files.output_folder import sync

#: What the name of a file that is being written begins with.
PARTIAL = ".partial-"


def write_whole(path: Path, content: str | bytes) -> None:
    """Give a small file its content, durably: a reader finds the old one or the new one.

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
        e.filename = str(path)  # which the calls themselves do not know
        partial.unlink(missing_ok=True)
        raise
