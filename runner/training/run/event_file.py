"""Events for TensorBoard, written without TensorFlow."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb

from runner.data.reading.records import framed

#: Version of the format, which the first event of a file states.
_VERSION = "brain.Event:2"


class EventFile:
    """Events of one process, in a file of their own as TensorBoard reads them: TFRecords of Event
    protocol buffers.

    Args:
        folder: folder of the file.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
        number = sum(1 for _ in folder.glob(f"{name}.*"))
        self._file = (folder / f"{name}.{number}.v2").open("xb")
        self._write(Event(wall_time=now, file_version=_VERSION))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a number."""
        self._write(Event(wall_time=time.time(), step=step, summary=scalar_pb(tag, value)))

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Add the distribution of values."""
        self._write(Event(wall_time=time.time(), step=step, summary=histogram_pb(tag, values)))

    def flush(self) -> None:
        """Pass the events to the system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        self._file.write(framed(event.SerializeToString()))
