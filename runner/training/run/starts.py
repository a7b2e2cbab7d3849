"""starts.jsonl: each time that a run was started or resumed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

STARTS_FILE = "starts.jsonl"


@dataclass(frozen=True, slots=True)
class Start:
    """One process of a run."""

    step: int
    """Step that it resumed from, 0 at the start."""
    target: int
    """Step that it trained to, unless it was stopped."""
    time: str
    """Date and time of the start, in UTC by ISO 8601."""


def record_start(model_dir: Path, step: int, target: int) -> None:
    """Append a start to the file of a run.

    Raises:
        OSError: the disk is full or not writable.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"step": step, "target": target, "time": time}) + "\n"
    path = model_dir / STARTS_FILE
    cut = path.is_file() and not path.read_bytes().endswith(b"\n")  # by a kill
    with path.open("a", encoding="utf-8") as f:
        f.write("\n" * cut + line)
        f.flush()
        os.fsync(f.fileno())


def read_starts(model_dir: Path) -> list[Start]:
    """Return the starts of a run, the first one first; lines that a kill has cut are left out."""
    path = model_dir / STARTS_FILE
    found: list[Start] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            found.append(Start(int(row["step"]), int(row["target"]), str(row["time"])))
        except (ValueError, KeyError, TypeError):
            continue
    return found
