"""starts.jsonl: each time that a run was started or resumed, and where in its records.

The checkpoints themselves hold what the reference's hold, so that either program reads them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from gptj_convert.files.json_lines import append_line, read_lines
from gptj_convert.files.output_folder import sync
from runner.data.reading.place import Place

STARTS_FILE = "starts.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One process of a run, and where in the training records it started."""

    step: int
    """Step that it resumed from, 0 at the start."""
    target: int
    """Step that it trained to, unless it was stopped."""
    skipped: int
    """Number of steps without an update before it."""
    epoch: int
    """Number of whole passes over the records before it."""
    record: int
    """Number of records of that epoch that were read."""
    records: int | None
    """Records per epoch, if they were counted."""
    batch_size: int
    grad_accum_steps: int
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    """Date and time of the start, in UTC by ISO 8601."""

    @property
    def place(self) -> Place:
        """Place in the training records."""
        return Place(self.epoch, self.record)


def record_start(model_dir: Path, start: Start) -> None:
    """Append a start to the file of a run, durably: the place of later checkpoints depends on it.

    Raises:
        OSError: the disk is full or not writable.
    """
    append_line(model_dir / STARTS_FILE, asdict(start))
    sync(model_dir)


def read_starts(model_dir: Path) -> list[Start]:
    """Return the starts of a run, the first one first; lines that a kill has cut are left out."""
    found: list[Start] = []
    for values in read_lines(model_dir / STARTS_FILE):
        try:
            found.append(Start(**values))
        except TypeError:
            continue
    return found
