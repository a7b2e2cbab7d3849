"""The writer: the same bytes for any block size, wherever an earlier pass was interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.files.ranged_file import ALIGNMENT
from gptj_convert.formats.containers.layout import FileLayout, Layout
from gptj_convert.streams import writer
from gptj_convert.streams.pipeline import Pipeline
from gptj_convert.streams.strips import Strip
from gptj_convert.streams.writer import ResumePoint, find_resume_point, reserve, write_files
from gptj_model.errors import FileFault
from gptj_model.op import Op
from gptj_model.source import TensorInfo

DTYPES = st.sampled_from(["float32", "float16", "int64"])
TENSORS = st.lists(st.tuples(DTYPES, st.integers(0, 3000)), min_size=1, max_size=8)
settings_ = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Stop(Exception):
    """The pass is interrupted."""


def a_layout(tensors: list[tuple[str, int]], files: int) -> tuple[Layout, dict[str, np.ndarray]]:
    infos = {str(n): TensorInfo(dtype, (size,)) for n, (dtype, size) in enumerate(tensors)}
    rng = np.random.default_rng(len(tensors))
    values = {
        name: rng.integers(-1000, 1000, info.shape).astype(info.dtype)
        for name, info in infos.items()
    }
    parts = [tuple(infos)[i::files] for i in range(files)]
    in_panels = tuple(FileLayout(f"file{i}", (b"head", *names)) for i, names in enumerate(parts))
    return Layout(infos, in_panels, lambda checksums: {}), values


def strips(values: np.ndarray) -> Iterator[Strip]:
    for at in range(0, values.size, 700):
        yield Strip(values[at : at + 700], Op.COPY)


def run(layout: Layout, folder: Path, values, start: ResumePoint, *, blocks: int | None = None):
    """Write, stop after N blocks, and return the checksums of the tensors that ended in them."""
    finished: dict[str, int] = {}
    with Pipeline() as pipeline:
        events = write_files(layout, folder, lambda n: strips(values[n]), pipeline, start)
        for n, event in enumerate(events, start=1):
            finished |= dict(event.tensors)
            if n == blocks:
                break
    return finished


def found_start(layout: Layout, folder: Path, finished: dict[str, int]) -> ResumePoint:
    search = find_resume_point(layout, folder, finished)
    while True:
        try:
            next(search)
        except StopIteration as e:
            return e.value


@settings_
@given(tensors=TENSORS, files=st.integers(1, 3), block=st.integers(1, 3), stop=st.integers(0, 12))
def test_an_interrupted_pass_is_resumed(tmp_path: Path, tensors, files: int, block: int, stop: int):
    layout, values = a_layout(tensors, files)
    for file in layout.files:
        (tmp_path / file.name).unlink(missing_ok=True)
    with patch.object(writer, "BLOCK_BYTES", block * ALIGNMENT):
        reserve(layout, tmp_path)
        finished = run(layout, tmp_path, values, ResumePoint(), blocks=stop) if stop else {}
        start = found_start(layout, tmp_path, finished)
        assert start.checksums.keys() == finished.keys()
        finished |= run(layout, tmp_path, values, start)
    assert finished == {name: crc32c(v.tobytes()) for name, v in values.items()}
    assert start.checksums == finished
    for file in layout.files:
        content = b"".join(p if isinstance(p, bytes) else values[p].tobytes() for p in file.parts)
        assert (tmp_path / file.name).read_bytes() == content
        assert start.digests[file.name] == hashlib.sha256(content).hexdigest()


def test_tensors_damaged_meanwhile_are_written_again(tmp_path: Path):
    layout, values = a_layout([("float32", 3000)] * 3, 1)
    reserve(layout, tmp_path)
    finished = run(layout, tmp_path, values, ResumePoint())
    path = tmp_path / "file0"
    whole = path.read_bytes()
    path.write_bytes(whole[:13_000] + b"damage" + whole[13_006:])
    start = found_start(layout, tmp_path, finished)
    assert list(start.checksums) == ["0"]
    run(layout, tmp_path, values, start)
    assert path.read_bytes() == whole


def test_a_fault_of_the_source_ends_the_pass(tmp_path: Path):
    layout, values = a_layout([("float32", 3000)] * 3, 1)
    reserve(layout, tmp_path)

    def content(name: str) -> Iterator[Strip]:
        if name == "1":
            raise FileFault("the device is gone")
        return strips(values[name])

    with pytest.raises(FileFault, match="the device is gone"), Pipeline() as pipeline:
        list(write_files(layout, tmp_path, content, pipeline, ResumePoint()))


def test_never_overwrites_a_file(tmp_path: Path):
    layout, _ = a_layout([("float32", 10)], 1)
    (tmp_path / "file0").write_bytes(b"mine")
    with pytest.raises(FileFault, match="File exists"):
        reserve(layout, tmp_path)
    assert (tmp_path / "file0").read_bytes() == b"mine"
