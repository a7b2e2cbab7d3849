"""Arrays in memory, written to the files of a layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gptj_convert.formats.containers.layout import Layout
from gptj_convert.streams.pipeline import Pipeline
from gptj_convert.streams.strips import Strip
from gptj_convert.streams.writer import ResumePoint, reserve, write_files
from gptj_model.op import Op


def write(layout: Layout, folder: Path, content: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Write the files, and return the crc32c of every tensor's bytes."""
    reserve(layout, folder)
    start = ResumePoint()
    with Pipeline() as pipeline:
        pieces = write_files(
            layout, folder, lambda name: [Strip(content[name], Op.COPY)], pipeline, start
        )
        for _ in pieces:
            pass
    return start.checksums
