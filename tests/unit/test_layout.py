"""Places of the bytes of a new checkpoint."""

from __future__ import annotations

from gptj_convert.formats.containers.layout import FileLayout, Layout
from gptj_model.source import TensorInfo

A, B, C = (TensorInfo("float32", (n,)) for n in (2, 0, 3))
FIRST = FileLayout("first", (b"head", "a", "b"))
SECOND = FileLayout("second", ("c", b"!"))
LAYOUT = Layout({"a": A, "b": B, "c": C}, (FIRST, SECOND), lambda checksums: {})


def test_parts_follow_one_another():
    assert list(LAYOUT.spans(FIRST)) == [(b"head", 0, 4), ("a", 4, 12), ("b", 12, 12)]
    assert list(LAYOUT.spans(SECOND)) == [("c", 0, 12), (b"!", 12, 13)]
    assert [LAYOUT.size(f) for f in (FIRST, SECOND, FileLayout("none", ()))] == [12, 13, 0]
    assert LAYOUT.total == 25


def test_tensors_from_a_position_on():
    assert list(LAYOUT.tensors_from(0, 0)) == ["a", "b", "c"]
    assert list(LAYOUT.tensors_from(0, 4)) == ["a", "b", "c"]
    assert list(LAYOUT.tensors_from(0, 5)) == ["b", "c"]
    assert list(LAYOUT.tensors_from(1, 0)) == ["c"]
    assert list(LAYOUT.tensors_from(1, 1)) == []
