"""Two checkpoints compared value by value: every outcome, and the figures of what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_convert.checkpoint.match import survey
from gptj_convert.inspection.diff import Comparison, Outcome, compare, in_step
from gptj_convert.inspection.inspect import Inspection
from gptj_convert.streams import strips
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.tensors import Scheme, table
from tests.small_model import SMALL
from tests.unit.memory_source import MemorySource
from tests.unit.working import drain

CONFIG = GPTJConfig.preset("tiny", **SMALL)
#: A matrix, square, so that its layout does not show in its shape; in HF's layout 48 × 48.
Q = "transformer.h.0.attn.q_proj.weight"
EXTRA = "extra"


def _values(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(48, 48)).astype(np.float32)


def _inspection(
    arrays: dict[str, np.ndarray], scheme: Scheme = Scheme.HF, config: GPTJConfig | None = CONFIG
) -> Inspection:
    """A checkpoint of tensors by HF name."""
    rows = {t.hf: t for t in table(CONFIG)}
    named: dict[str, np.ndarray] = {}
    for name, values in arrays.items():
        if row := rows.get(name):
            named[row.name(scheme)] = row.op(Scheme.HF, scheme)(values)
        else:
            named[name] = values
    source = MemorySource(named)
    fault = None if config else ConfigError("no config")
    findings = tuple(survey(source.tensors, scheme, config))
    return Inspection(Path("x"), scheme, source, (), config, fault, findings)


def _compare(first: Inspection, second: Inspection) -> Comparison:
    with patch.object(strips, "PANEL_BYTES", 400), patch.object(strips, "STRIP_BYTES", 2000):
        progress, result = drain(compare(first, second))
    done = [p.done for p in progress]
    assert done == sorted(done)
    if progress:
        assert progress[-1].what in {t.name for t in result.tensors}
    return result


def _one(a: np.ndarray, b: np.ndarray, **schemes: Scheme):
    """Return the comparison of Q."""
    first = _inspection({Q: a}, schemes.get("first", Scheme.HF))
    second = _inspection({Q: b}, schemes.get("second", Scheme.HF))
    result = _compare(first, second)
    return next(t for t in result.tensors if t.name == Q)


@pytest.mark.parametrize("second", Scheme)
@pytest.mark.parametrize("first", Scheme)
def test_one_changed_value_is_found_in_every_layout(first: Scheme, second: Scheme):
    a, b = _values(), _values()
    b[5, 7] += 0.5
    b[5, 40] -= 0.25
    b[6, 7] += 0.125
    found = _one(a, b, first=first, second=second)
    assert found.outcome is Outcome.DIFFERENT
    assert (found.values, found.differing, found.nonfinite) == (48 * 48, 3, 0)
    assert found.max_abs == pytest.approx(0.5, rel=1e-5)
    assert found.relative == pytest.approx(0.5 / b.std(dtype=np.float64), rel=1e-5)
    assert found.first == [5, 7]
    assert found.first_values == (a[5, 7], b[5, 7])
    assert found.rounded is None
    assert (found.dtypes, found.shapes) == (("float32",) * 2, ((48, 48),) * 2)


@pytest.mark.parametrize("scheme", Scheme)
def test_equal_bits_are_identical(scheme: Scheme):
    found = _one(_values(), _values(), second=scheme)
    assert (found.outcome, found.values, found.differing) == (Outcome.IDENTICAL, 48 * 48, 0)
    assert (found.first, found.max_abs, found.relative) == (None, None, None)


def test_first_is_the_first_in_the_second_file():
    a, b = _values(), _values()
    b[3, 0] += 1
    b[0, 3] += 1
    assert _one(a, b, second=Scheme.HF).first == [0, 3]
    assert _one(a, b, second=Scheme.TF).first == [3, 0]


def test_signs_of_zeros_and_kinds_of_nan_are_equal():
    a, b = _values(), _values()
    a[0, 0], b[0, 0] = 0.0, -0.0
    a[0, 1] = np.nan
    b[0, 1:2].view(np.uint32)[:] = 0xFFC00001
    found = _one(a, b)
    assert (found.outcome, found.differing, found.first) == (Outcome.EQUAL, 0, None)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_another_dtype_that_holds_the_values_is_equal(dtype: type):
    a = _values().astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32)
    a = a.astype(ml_dtypes.bfloat16).astype(np.float32)
    found = _one(a, a.astype(dtype))
    assert (found.outcome, found.differing, found.values) == (Outcome.EQUAL, 0, 48 * 48)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("side", ["path", "other"])
def test_rounding_is_told_from_a_difference(dtype: type, side: str):
    wide, narrow = _values(), _values().astype(dtype)
    pair = (narrow, wide) if side == "path" else (wide, narrow)
    found = _one(*pair)
    assert (found.outcome, found.rounded) == (Outcome.ROUNDED, side)
    assert found.differing > 2000
    changed = narrow.astype(np.float32)
    changed[47, 47] += 0.5
    narrow = changed.astype(dtype)
    found = _one(*((narrow, wide) if side == "path" else (wide, narrow)))
    assert (found.outcome, found.rounded) == (Outcome.DIFFERENT, None)


def test_two_narrow_dtypes_are_compared_in_a_wider_one():
    a = _values().astype(np.float16)
    found = _one(a, a.astype(ml_dtypes.bfloat16))
    assert (found.outcome, found.rounded) == (Outcome.ROUNDED, "other")
    whole = np.arange(2304).reshape(48, 48)
    big = whole.astype(np.int64) + 2**24
    found = _one(big, big.astype(np.float32))
    assert found.outcome is Outcome.DIFFERENT  # float64 holds both: odd numbers were lost
    assert found.max_abs == 1


def test_large_whole_numbers_are_not_rounded_to_be_compared():
    a = np.full((48, 48), 2**60, np.int64)
    b = a.copy()
    b[1, 2] += 1
    found = _one(a, b)
    assert (found.outcome, found.differing, found.first) == (Outcome.DIFFERENT, 1, [1, 2])


def test_what_is_not_finite_is_counted_and_has_no_delta():
    a, b = _values(), _values()
    a[0, 2], b[0, 2] = np.nan, 1.0
    a[1, 0], b[1, 0] = 1.0, -np.inf
    b[2, 0] += 0.25
    found = _one(a, b)
    assert (found.differing, found.nonfinite) == (3, 2)
    assert found.max_abs == pytest.approx(0.25, rel=1e-5)
    assert found.first_values == ("nan", 1.0)
    b[2, 0] = a[2, 0]
    found = _one(a, b)
    assert (found.differing, found.nonfinite, found.max_abs, found.relative) == (2, 2, None, None)


def test_without_spread_nothing_is_relative():
    a, b = np.ones((48, 48), np.float32), np.zeros((48, 48), np.float32)
    found = _one(a, b)
    assert (found.max_abs, found.relative) == (1, None)


def test_tensors_of_one_side_and_of_other_shapes_differ():
    first = {Q: _values(), EXTRA: np.zeros(3, np.float32), "a": np.ones(4, np.float32)}
    second = {EXTRA: np.zeros((3, 1), np.float16), "a": np.ones(4, np.float32)}
    result = _compare(_inspection(first), _inspection(second))
    found = {t.name: t for t in result.tensors}
    assert set(found) == {Q, EXTRA, "a"}
    assert (found[Q].dtypes, found[Q].shapes) == (("float32", None), ((48, 48), None))
    assert (found[EXTRA].dtypes, found[EXTRA].shapes) == (("float32", "float16"), ((3,), (3, 1)))
    assert (found[Q].outcome, found[EXTRA].outcome) == (Outcome.DIFFERENT,) * 2
    assert (found[EXTRA].values, found["a"].outcome) == (0, Outcome.IDENTICAL)
    assert result.outcome is Outcome.DIFFERENT
    assert result.counts() == {"identical": 1, "equal": 0, "rounded": 0, "different": 2}
    shown = result.to_json()
    assert [t["name"] for t in shown["tensors"]] == [Q, EXTRA]
    assert shown["tensors"][0]["outcome"] == shown["outcome"] == "different"
    assert shown["counts"] == result.counts()


def test_a_stray_name_is_not_taken_for_a_row():
    """In a TF checkpoint a tensor with a row's HF name is another tensor."""
    first, stray = _inspection({Q: _values()}), MemorySource({Q: _values()})
    findings = tuple(survey(stray.tensors, Scheme.TF, CONFIG))
    second = replace(first, scheme=Scheme.TF, source=stray, findings=findings)
    found = [t for t in _compare(first, second).tensors if t.name == Q]
    assert [t.shapes for t in found] == [((48, 48), None), (None, (48, 48))]


def test_a_row_that_is_no_matrix_is_compared_as_it_lies():
    flat = np.arange(6, dtype=np.float32)
    found = _one(flat, flat + 1, second=Scheme.TF)
    assert (found.shapes, found.differing, found.first) == (((6,), (6,)), 6, [0])


def test_what_is_no_part_of_the_model_is_only_counted():
    name = "transformer.h.0.attn.masked_bias"
    first = _inspection({Q: _values(), name: np.zeros(1, np.float32)})
    second = _inspection({Q: _values(), "global_step": np.zeros((), np.int64)}, Scheme.TF)
    result = _compare(first, second)
    assert [t.name for t in result.tensors] == [Q]
    assert result.not_compared == ({"ignored buffer": 1}, {"training state": 1})
    assert result.to_json()["not_compared"] == result.not_compared


@pytest.mark.parametrize(
    ("field", "value", "outcome"),
    [("embd_pdrop", 0.5, Outcome.IDENTICAL), ("n_positions", 64, Outcome.DIFFERENT)],
)
def test_the_config_counts_unless_it_computes_the_same(field: str, value: Any, outcome: Outcome):
    first, second = _inspection({Q: _values()}), _inspection({Q: _values()})
    second = replace(second, config=replace(CONFIG, **{field: value}))
    result = _compare(first, second)
    assert result.outcome is outcome
    assert result.to_json()["config"] == {field: (getattr(CONFIG, field), value)}


@pytest.mark.parametrize("side", [0, 1])
def test_without_a_config_names_cannot_be_matched(side: int):
    sides = [_inspection({Q: _values()}), _inspection({Q: _values()})]
    sides[side] = _inspection({Q: _values()}, config=None)
    with pytest.raises(ConfigError, match="no config") as caught:
        _compare(*sides)
    assert "--config" in str(caught.value.hint)


def test_progress_is_in_bytes_of_the_first():
    first = _inspection({Q: _values(), EXTRA: np.zeros(3, np.float64)})
    second = _inspection({Q: _values().astype(np.float16), EXTRA: np.zeros(3, np.float64)})
    progress, _ = drain(compare(first, second))
    assert progress[-1].done == progress[-1].total == 48 * 48 * 4 + 24


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_pieces_are_brought_in_step(a: list[int], b: list[int]):
    size = min(sum(a), sum(b))

    def pieces(sizes: list[int]):
        values, at = np.arange(size), 0
        for n in sizes:
            if values[at : at + n].size:
                yield values[at : at + n]
            at += n

    pairs = list(in_step(pieces(a), pieces(b)))
    assert all(x.size and np.array_equal(x, y) for x, y in pairs)
    assert sum(x.size for x, _ in pairs) == size


def test_an_empty_comparison_is_identical():
    assert Comparison().outcome is Outcome.IDENTICAL
    assert set(Comparison().counts().values()) == {0}
