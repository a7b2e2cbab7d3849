"""Every tensor of two sides, bit for bit: what is counted, and what is found without a diff."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from gptj_convert.streams import strips
from gptj_convert.verification.evidence.bitwise import (
    Compared,
    compare_weights,
    in_file_order,
    new_duplicates,
    new_zeros,
    pair_up,
)
from gptj_convert.verification.evidence.verdict import names
from gptj_model.config import GPTJConfig
from gptj_model.op import Op
from gptj_model.tensors import Scheme, table
from tests.small_model import SMALL
from tests.unit.memory_source import MemorySource
from tests.unit.working import drain

ROWS = {t.hf: t for t in table(GPTJConfig.preset("tiny", **SMALL))}
Q = "transformer.h.0.attn.q_proj.weight"
K = "transformer.h.0.attn.k_proj.weight"
FC = "transformer.h.0.mlp.fc_in.weight"
LN = "transformer.h.0.ln_1.weight"


def _arrays(dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(4)
    return {n: random.normal(size=ROWS[n].shape).astype(dtype) for n in (LN, Q, K, FC)}


def _source(arrays: dict[str, np.ndarray], scheme: Scheme) -> MemorySource:
    """Arrays by HF name and in HF's layout, as a scheme stores them."""
    return MemorySource(
        {ROWS[n].name(scheme): ROWS[n].op(Scheme.HF, scheme)(a) for n, a in arrays.items()}
    )


def _compare(
    expected: dict[str, np.ndarray],
    found: dict[str, np.ndarray],
    schemes: tuple[Scheme, Scheme] = (Scheme.HF, Scheme.TF),
    saturated: bool = False,
    hashing: tuple[int, ...] = (),
) -> tuple[dict[str, Compared], MemorySource]:
    sides = [_source(a, s) for a, s in zip((expected, found), schemes, strict=True)]
    listed = [
        [(ROWS[n], ROWS[n].name(s), side.tensors[ROWS[n].name(s)]) for n in arrays]
        for side, s, arrays in zip(sides, schemes, (expected, found), strict=True)
    ]
    pairs = pair_up(listed[0], schemes[0], listed[1], schemes[1])
    pieces = iter(hashing)
    with patch.object(strips, "PANEL_BYTES", 400), patch.object(strips, "STRIP_BYTES", 2000):
        progress, compared = drain(
            compare_weights(pairs, *sides, saturated=saturated, hashing=pieces)
        )
    assert next(pieces, None) is None
    total = sum(p.info.nbytes for p in pairs)
    assert [p.total for p in progress] == [total] * len(progress)
    assert progress[-1].done == total
    assert {p.what for p in progress} == {p.tensor.hf for p in pairs}
    assert [c.pair for c in compared] == pairs
    return {c.pair.tensor.hf: c for c in compared}, sides[1]


@pytest.mark.parametrize("schemes", [(a, b) for a in Scheme for b in Scheme])
def test_what_differs_is_counted_and_placed(schemes: tuple[Scheme, Scheme]):
    arrays, changed = _arrays(), _arrays()
    changed[FC][150, 40] += 0.5
    changed[FC][150, 41] -= 0.25
    changed[LN][3] += 1
    found, _ = _compare(arrays, changed, schemes, hashing=(5000, 5000, 10**9))
    c = found[FC]
    assert (c.differing, c.index) == (2, [150, 40])
    assert c.max_abs == pytest.approx(0.5, rel=1e-5)
    assert (c.found, c.expected) == (changed[FC][150, 40], arrays[FC][150, 40])
    assert c.to_json() == names(ROWS[FC]) | {
        "values": ROWS[FC].size,
        "differing": 2,
        "max_abs": c.max_abs,
        "first": [150, 40],
        "found": float(c.found),
        "expected": float(c.expected),
    }
    assert (found[LN].differing, found[LN].index) == (1, [3])
    assert (found[Q].differing, found[Q].index, found[Q].max_abs) == (0, None, None)
    for name, c in found.items():
        sides = [ROWS[name].op(Scheme.HF, s) for s in schemes]
        assert c.source_crc == crc32c(sides[0](arrays[name]).tobytes())
        assert c.expected_crc == crc32c(sides[1](arrays[name]).tobytes())
        assert c.found_crc == crc32c(sides[1](changed[name]).tobytes())


def test_only_bits_count():
    arrays, changed = _arrays(), _arrays()
    arrays[Q][0, 0], changed[Q][0, 0] = 0.0, -0.0
    for side in (arrays, changed):
        side[Q][1, 1] = np.nan
    found, _ = _compare(arrays, changed)
    assert (found[Q].differing, found[Q].index, found[Q].max_abs) == (1, [0, 0], 0)


def test_the_source_is_rounded_before():
    arrays = _arrays()
    narrow = {n: a.astype(np.float16) for n, a in arrays.items()}
    found, _ = _compare(arrays, narrow)
    assert all(c.differing == 0 for c in found.values())
    assert found[Q].found_crc == found[Q].expected_crc != found[Q].source_crc


def test_values_beyond_the_range_may_be_its_largest():
    arrays = _arrays()
    narrow = {n: a.astype(np.float16) for n, a in arrays.items()}
    arrays[Q][2, 3], narrow[Q][2, 3] = 1e6, 65504
    assert _compare(arrays, narrow, saturated=True)[0][Q].differing == 0
    c = _compare(arrays, narrow)[0][Q]
    assert (c.differing, c.index, c.found, c.max_abs) == (1, [2, 3], 65504, None)
    assert c.to_json()["expected"] == "inf"


def test_what_is_not_finite_is_counted_on_both_sides():
    arrays, changed = _arrays(), _arrays()
    arrays[Q][0, :3] = [np.nan, np.inf, 1]
    changed[Q][0, :3] = [np.nan, 1, -np.inf]
    changed[Q][9, 9] = np.nan
    arrays[Q][40, 40] = np.inf
    changed[Q][41, 40] += 2
    c = _compare(arrays, changed)[0][Q]
    assert (c.nonfinite_found, c.nonfinite_expected) == (3, 3)
    assert c.differing == 5
    assert c.max_abs == pytest.approx(2, rel=1e-5)


def test_a_side_may_have_more_that_is_not_finite():
    arrays, changed = _arrays(), _arrays()
    arrays[Q][0, :3] = np.nan
    changed[Q][0, 0] = np.nan
    c = _compare(arrays, changed)[0][Q]
    assert (c.nonfinite_found, c.nonfinite_expected, c.differing) == (1, 3, 2)


def test_a_delta_beyond_every_number_is_none():
    arrays, changed = _arrays(np.float64), _arrays(np.float64)
    arrays[Q][0, 0], changed[Q][0, 0] = 1.5e308, -1.5e308
    c = _compare(arrays, changed)[0][Q]
    assert (c.differing, c.max_abs) == (1, None)


def test_zeros_and_duplicates_that_the_source_has_not():
    arrays = _arrays()
    arrays[LN][:] = 0
    assert new_zeros(_compare(arrays, arrays)[0].values()) == []
    changed = dict(_arrays(), **{LN: arrays[LN], FC: np.zeros(ROWS[FC].shape, np.float32)})
    changed[K] = changed[Q]
    found, side = _compare(arrays, changed)
    assert new_zeros(found.values()) == [FC]
    assert new_duplicates(found.values(), side) == [[Q, K]]
    arrays[K] = arrays[Q]
    found, side = _compare(arrays, changed)
    assert new_duplicates(found.values(), side) == []


def test_equal_checksums_alone_are_no_duplicate():
    found, side = _compare(_arrays(), _arrays())
    found[K].found_crc = found[Q].found_crc
    assert new_duplicates(found.values(), side) == []


def test_pairs_are_those_of_one_shape_in_the_sources_order():
    source = [(ROWS[n], n, MemorySource({n: a}).tensors[n]) for n, a in _arrays().items()]
    there = _source(dict(_arrays(), **{Q: np.ones((2, 3), np.float32)}), Scheme.TF)
    rows = {t.tf: t for t in ROWS.values()}
    converted = [(rows[n], n, info) for n, info in reversed(there.tensors.items())]
    pairs = pair_up(source, Scheme.HF, converted[:-1], Scheme.TF)
    assert [p.tensor.hf for p in pairs] == [K, FC]
    assert [(p.op, p.transposed) for p in pairs] == [(Op.TRANSPOSE, True)] * 2
    assert [(p.source_name, p.name) for p in pairs] == [(n, ROWS[n].tf) for n in (K, FC)]
    assert pairs[1].info.shape == pairs[1].source.shape[::-1]
    assert pairs[0].names == names(ROWS[K])
    backwards = pair_up(converted, Scheme.TF, source, Scheme.HF)
    assert [(p.op, p.transposed) for p in backwards if p.tensor.hf == K] == [(Op.TRANSPOSE, False)]
    assert in_file_order(pairs[::-1], there) == pairs


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 191), st.integers(0, 47)), min_size=1, unique=True))
def test_any_flipped_bits_are_all_counted(places: list[tuple[int, int]]):
    arrays, changed = _arrays(), _arrays()
    for place in places:
        changed[FC][place] = -changed[FC][place]
    c = _compare(arrays, changed)[0][FC]
    assert c.differing == len(places)
    assert c.index == list(min(places, key=lambda p: p[::-1]))
    assert c.max_abs == max(2 * abs(float(arrays[FC][p])) for p in places)
