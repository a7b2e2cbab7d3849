"""Strips and panels: at any sizes, their bytes are those of the whole tensor."""

from __future__ import annotations

import gc
import weakref
from unittest.mock import patch

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptj_convert.streams import strips
from gptj_model.op import Op
from gptj_model.source import raw_bytes
from tests.unit.memory_source import MemorySource


def _source(values: np.ndarray) -> MemorySource:
    return MemorySource({"x": values})


@given(
    values=hnp.arrays(
        st.sampled_from([np.float32, np.float16]),
        hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=40),
        elements=st.floats(-100, 100, width=16),
    ),
    panel=st.integers(1, 400),
    strip=st.integers(1, 2000),
    op=st.sampled_from(Op),
)
@example(np.arange(100, dtype=np.float32).reshape(10, 10), 60, 200, Op.TRANSPOSE)  # two strips
@example(np.arange(100, dtype=np.float32).reshape(10, 10), 60, 400, Op.TRANSPOSE)  # one strip
def test_panels_are_the_tensor_in_the_targets_order(values, panel: int, strip: int, op: Op):
    with patch.object(strips, "PANEL_BYTES", panel), patch.object(strips, "STRIP_BYTES", strip):
        reader = strips.Panels(_source(values), "x", op)
        found = b"".join(bytes(raw_bytes(p)) for p in reader)
    assert found == np.ascontiguousarray(op(values)).tobytes()
    assert reader.crc == crc32c(values.tobytes())


@given(
    shape=hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=40),
    panel=st.integers(1, 400),
    strip=st.integers(1, 2000),
    op=st.sampled_from(Op),
)
def test_strip_sizes_are_known_in_advance(shape: tuple[int, ...], panel: int, strip: int, op: Op):
    source = _source(np.zeros(shape, np.float32))
    with patch.object(strips, "PANEL_BYTES", panel), patch.object(strips, "STRIP_BYTES", strip):
        found = [s.values.nbytes for s in strips.Strips(source, "x", op)]
        assert strips.strip_sizes(source.tensors["x"], op) == found


@pytest.mark.parametrize("panel", [1000, strips.PANEL_BYTES])
def test_there_are_few_buffers_whatever_the_size_of_a_panel(panel: int):
    with patch.object(strips, "PANEL_BYTES", panel):
        found = [strips.strip_buffers(size) for size in (0, panel, 2 * panel, 100 * panel)]
    assert found == [8, 8, 4, 2]


def test_strips_of_a_copy_follow_one_another_in_the_source():
    source = _source(np.ones((10, 10), np.float32))
    with patch.object(strips, "PANEL_BYTES", 60), patch.object(strips, "STRIP_BYTES", 200):
        for op in (Op.COPY, Op.TRANSPOSE):
            assert len(strips.strip_sizes(source.tensors["x"], op)) > 1
            assert strips.Strips(source, "x", op).are_contiguous is (op is Op.COPY)


def test_panels_free_their_memory_at_once():
    """A reference cycle would keep it until the next garbage collection."""
    reader = strips.Panels(_source(np.ones((3, 4), np.float32)), "x", Op.TRANSPOSE)
    gone = weakref.ref(reader)
    gc.disable()
    try:
        for _ in reader:
            pass
        del reader
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("target", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (300, 4100), (1100, 135), (131, 2052)])
def test_beyond_every_tile(dtype, target, shape: tuple[int, int]):
    """Matrices larger than a tile of the transposition, filled from odd positions."""
    values = (np.arange(np.prod(shape)) % 2003).reshape(shape).astype(dtype)
    whole = values.T.astype(target).reshape(-1)
    strip = strips.Strip(values, Op.TRANSPOSE)
    for begin, end in ((0, whole.size), (1, whole.size), (3 * shape[0] + 1, whole.size - 5)):
        out = np.empty(max(0, end - begin), target)
        strip.fill(out, begin)
        assert np.array_equal(out, whole[begin:end])


@pytest.mark.parametrize("op", Op)
def test_panels_are_small(op: Op):
    values = np.zeros((1000, 3000), np.float32)
    with patch.object(strips, "PANEL_BYTES", 40_000), patch.object(strips, "STRIP_BYTES", 80_000):
        sizes = [p.nbytes for p in strips.Panels(_source(values), "x", op)]
    assert max(sizes) <= 40_000
    assert sum(sizes) == values.nbytes


@given(
    hnp.arrays(
        np.uint32, hnp.array_shapes(min_dims=1, max_dims=2), elements=st.integers(0, 2**32 - 1)
    ),
    st.sampled_from(Op),
)
def test_every_op_undoes_itself_bit_for_bit(bits: np.ndarray, op: Op):
    values = bits.view(np.float32)
    there = np.ascontiguousarray(op(values))
    assert there.shape == op.shape(values.shape)
    assert np.array_equal(op(there).view(np.uint32), bits)
