"""Whole examples in sequences: each once, in order, and the same wherever a run resumes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from runner.data.making.instruction.packing import COUNTED, ExamplePacker, units

LENGTH, END = 12, 99


@st.composite
def examples(draw: st.DrawFn) -> list[np.ndarray]:
    sizes = draw(st.lists(st.integers(1, LENGTH + 1), min_size=1, max_size=20))
    flags = st.lists(st.booleans(), min_size=LENGTH + 1, max_size=LENGTH + 1)
    return [
        units([10 * n + k for k in range(s)], np.array(draw(flags)[:s]))
        for n, s in enumerate(sizes)
    ]


def _packed(parts: list[list[np.ndarray]], most: int) -> np.ndarray:
    packer = ExamplePacker(LENGTH, END)
    blocks = []
    for part in parts:
        packer.add(np.concatenate(part))
        while len(block := packer.cut(most)):
            assert len(block) <= most
            blocks.append(block)
    blocks.append(packer.finish())
    assert packer.left == 0
    assert not len(packer.finish())
    return np.concatenate(blocks)


@given(examples(), st.integers(0, 20), st.integers(1, 3))
def test_each_example_once_whole_and_in_order(found: list[np.ndarray], at: int, most: int):
    parts = [part for part in (found[:at], found[at:]) if part]
    block = _packed(parts, most)
    assert np.array_equal(block, _packed([found], 100))
    rest = list(found)
    for ids, mask, labels in block:
        row, counted = [int(ids[0]), *labels.tolist()], [0, *mask.tolist()]
        assert row[:-1] == ids.tolist()
        place = 0
        while rest and place + len(rest[0]) <= LENGTH + 1:
            tokens = rest.pop(0)
            end = place + len(tokens)
            assert row[place:end] == tokens[:, 0].tolist()
            shown = (tokens[:, 1] & COUNTED).tolist()
            assert counted[max(place, 1) : end] == shown[max(1 - place, 0) :]
            place = end
        assert place
        assert set(row[place:]) <= {END}
        assert not any(counted[place:])
    assert not rest


@given(examples(), st.integers(1, 3))
def test_a_run_resumes_after_any_sequence(found: list[np.ndarray], most: int):
    """What is left after a sequence is what the next one begins with."""
    whole = np.concatenate(found)
    packer = ExamplePacker(LENGTH, END)
    packer.add(whole)
    first = packer.cut(most)
    again = ExamplePacker(LENGTH, END)
    again.add(whole[len(whole) - packer.left :])
    rest = np.concatenate([again.cut(100), again.finish()])
    assert np.array_equal(np.concatenate([first, rest]), _packed([found], 100))
