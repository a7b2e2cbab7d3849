"""Every corruption of the matrix is found, named and explained; healthy conversions pass."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.options import DTYPES
from tests.cli.corruptions import CASES, DATA, Corruption
from tests.conftest import make_checkpoint


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, its conversion `converted`, and `other`, that of another model."""
    from runner.cli.root import main

    folder = tmp_path_factory.mktemp("whole")
    for name, seed in (("converted", 7), ("other", 8)):
        hf = make_checkpoint(folder / f"hf-{name}", seed=seed)
        (hf / "tokenizer.json").write_text("{}")
        assert main(["convert", str(hf), "--to", "tf", "--out", str(folder / name), "--quiet"]) == 0
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """Copies of `converted` and `other` in the test's folder; the path of the former."""
    for name in ("converted", "other"):
        shutil.copytree(whole / name, tmp_path / name)
    return tmp_path / "converted"


def test_undamaged_it_passes(whole: Path, copy: Path, gptj):
    hf = whole / "hf-converted"
    done = gptj("verify", copy, "--against", hf, "--level", "weights", "--json")
    assert done.code == 0
    assert done.json["diagnosis"] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_corruption(case: Corruption, whole: Path, copy: Path, gptj):
    case.damage(copy)
    hf = whole / "hf-converted"
    done = gptj("verify", copy, "--against", hf, "--level", "weights", "--json")
    assert done.code == 3, done.stderr
    assert done.json["ok"] is False
    first = done.json["first_difference"]
    assert first["level"] == case.level
    assert case.named in ((first["tensor"] or {}).get("hf"), first["file"])
    assert first["diagnosis"] == case.diagnosis
    assert not done.json["levels"][case.level]["ok"]


def test_cases_have_names_of_their_own():
    assert len({str(case) for case in CASES}) == len(CASES)


def test_the_data_file_has_the_size_that_cases_take_it_to_have(copy: Path):
    assert f"of {(copy / DATA).stat().st_size} that" in "".join(c.diagnosis or "" for c in CASES)


@st.composite
def _configs(draw: st.DrawFn) -> dict:
    n_head, half = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    return {
        "n_head": n_head,
        "n_embd": n_head * 2 * half,
        "rotary_dim": 2 * draw(st.integers(1, half)),
        "n_layer": draw(st.integers(1, 3)),
        "n_inner": draw(st.none() | st.integers(1, 50)),
        "vocab_size": draw(st.integers(2, 300)),
        "tie_word_embeddings": draw(st.booleans()),
    }


_ROUND_TRIPS = {
    "config": _configs(),
    "seed": st.integers(0, 2**32),
    "stored": st.sampled_from(DTYPES),
    "dtype": st.sampled_from((*DTYPES, "keep")),
    "layout": st.sampled_from(["tf", "keras", "hf", "hf in shards"]),
    "back": st.booleans(),
}


def _passes(gptj, config: dict, seed: int, stored: str, dtype: str, layout: str, back: bool):
    """Convert, optionally on to Hugging Face's layout, and verify."""
    with TemporaryDirectory() as folder:
        source = make_checkpoint(Path(folder) / "hf", seed=seed, dtype=stored, **config)
        out = Path(folder) / "out"
        shards = ("--max-shard-size", "20kB") if layout == "hf in shards" else ()
        to = (layout.split()[0], "--dtype", dtype, "--saturate", *shards)
        assert gptj("convert", source, "--to", *to, "--out", out).code == 0
        if back:
            source, out = out, Path(folder) / "back"
            assert gptj("convert", source, "--to", "hf", "--out", out).code == 0
        done = gptj("verify", out, "--level", "weights", "--json")
        assert done.code == 0, done.stdout
        assert done.json["levels"]["weights"]["not_compared"] == []


_SHARED = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20
)


@_SHARED
@given(**_ROUND_TRIPS)
def test_healthy_conversions_pass(gptj, config, seed, stored, dtype, layout, back):
    _passes(gptj, config, seed, stored, dtype, layout, back)


@pytest.mark.full
@settings(_SHARED, max_examples=200)
@given(**_ROUND_TRIPS)
def test_many_healthy_conversions_pass(gptj, config, seed, stored, dtype, layout, back):
    _passes(gptj, config, seed, stored, dtype, layout, back)
