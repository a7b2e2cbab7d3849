"""Ranges of files: the same bytes with and without the page cache."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.files.ranged_file import RangedFile
from gptj_model.errors import FileFault
from gptj_model.page_buffers import page_buffers

SIZE = 19 * 2**20 + 1234


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture(scope="module")
def large(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "file"
    path.write_bytes(content)
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return path


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(st.integers(0, SIZE), st.integers(0, SIZE), st.booleans())
def test_any_range(large: Path, content: bytes, a: int, b: int, cached: bool):
    begin, end = sorted((a, b))
    file = RangedFile(large)
    if not cached:
        with large.open("rb") as f:
            os.posix_fadvise(f.fileno(), begin // 2, end, os.POSIX_FADV_DONTNEED)
    assert file.read(begin, end - begin, "a range") == content[begin:end]
    file.close()


@pytest.mark.parametrize("length", [SIZE + 1, 2 * SIZE])
def test_beyond_the_end(large: Path, length: int):
    file = RangedFile(large)
    with pytest.raises(FileFault, match=f"ends at byte {SIZE} inside all of it"):
        file.read(0, length, "all of it")
    file.close()


@pytest.mark.parametrize("offset", [0, 2**22, 2**22 + 8, 2**20 * 15])
def test_a_range_into_whole_pages(large: Path, content: bytes, offset: int):
    with large.open("rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file = RangedFile(large)
    (memory,) = page_buffers(1, SIZE)
    for length in (min(9 * 2**20 + 100, SIZE - offset), 2**20, 5000):
        part = memory[:length]
        part.fill(0)
        file.read_into(offset, part.data, "a range")
        assert part.tobytes() == content[offset : offset + length]
    file.close()
