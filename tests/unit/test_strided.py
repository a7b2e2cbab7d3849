"""Views of a storage that torch saved are read with the elements that torch has."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.containers import strided
from gptj_convert.formats.containers.strided import StridedView
from gptj_convert.formats.containers.torch_checkpoint import TorchCheckpointSource
from gptj_convert.streams.strips import Panels
from gptj_model.op import Op
from gptj_model.source import read_columns, read_rows, read_tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def views(draw) -> torch.Tensor:
    """Views of a storage of distinct values, made by slicing, selecting and permuting."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    size = int(np.prod(shape))
    offset = draw(st.integers(0, 3))
    storage = torch.arange(size + offset, dtype=torch.float32).to(draw(st.sampled_from(DTYPES)))
    view = storage[offset:].view(shape)
    for axis in range(len(shape)):
        length = view.shape[axis]
        begin = draw(st.integers(0, length - 1))
        end = draw(st.integers(begin, length))
        step = draw(st.integers(1, 3))
        view = view[(slice(None),) * axis + (slice(begin, end, step),)]
    view = view.permute(draw(st.permutations(range(view.dim()))))
    if view.dim() > 1 and draw(st.booleans()) and view.shape[0]:
        view = view[draw(st.integers(0, view.shape[0] - 1))]
    return view


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return the bits of the values as integers, in row-major order."""
    if isinstance(values, torch.Tensor):
        values = values.contiguous().view(torch.uint8 if values.dim() == 0 else values.dtype)
        size = values.element_size()
        whole = {2: torch.int16, 4: torch.int32, 1: torch.uint8}[size]
        return values.contiguous().view(whole).numpy()
    return np.ascontiguousarray(values).view(f"i{values.itemsize}")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(view=views(), scratch=st.sampled_from([1, 8, 64, 2**20]))
def test_every_view_has_the_elements_of_torch(tmp_path, monkeypatch, view, scratch):
    monkeypatch.setattr(strided, "SCRATCH_BYTES", scratch)
    if view.dim() == 0:
        view = view[None]
    torch.save({"w": view}, tmp_path / "m.bin")
    source = TorchCheckpointSource(tmp_path / "m.bin")
    try:
        wanted = bits(view)
        assert source.tensors["w"].shape == wanted.shape
        np.testing.assert_array_equal(bits(read_tensor(source, "w")), wanted)
        for start, stop in ((0, len(wanted)), (len(wanted) // 2, len(wanted))):
            if len(wanted.shape) < 3:
                rows = read_rows(source, "w", start, stop)
                np.testing.assert_array_equal(bits(rows), wanted[start:stop])
        if len(wanted.shape) == 2 and wanted.size:
            columns = read_columns(source, "w", 0, wanted.shape[1] // 2 + 1)
            np.testing.assert_array_equal(bits(columns), wanted[:, : wanted.shape[1] // 2 + 1])
            for op in Op:
                panels = np.concatenate([bits(panel.copy()) for panel in Panels(source, "w", op)])
                np.testing.assert_array_equal(panels, op(wanted).reshape(-1))
    finally:
        source.close()


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 14)), min_size=1, max_size=2),
)
def test_overlap_agrees_with_counting_places(axes):
    shape, strides = zip(*axes, strict=True)
    view = StridedView(0, shape, strides)
    steps = product(*(range(n) for n in shape))
    places = [sum(i * s for i, s in zip(step, strides, strict=True)) for step in steps]
    assert (view.overlap is not None) == (len(set(places)) < len(places))
    assert view.extent == max(places) + 1


@pytest.mark.parametrize(
    ("view", "op"),
    [
        (torch.ones(3, 4), Op.COPY),
        (torch.ones(3, 4).t(), Op.TRANSPOSE),
        (torch.ones(3, 9)[:, 2:6].t(), Op.TRANSPOSE),
        (torch.ones(3, 9)[:, 2:6], Op.COPY),
        (torch.ones(1, 4).t(), Op.COPY),
        (torch.ones(2, 3, 4).permute(2, 1, 0), Op.COPY),
    ],
    ids=str,
)
def test_a_matrix_is_read_in_its_stored_order(tmp_path, view, op):
    torch.save({"w": view}, tmp_path / "m.bin")
    assert TorchCheckpointSource(tmp_path / "m.bin").tensors["w"].storage_op is op
