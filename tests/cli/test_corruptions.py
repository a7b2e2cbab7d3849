"""Every corruption of the matrix is found, blamed on the right tensor or file, and explained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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
    """One's own `converted` and `other`, the former's path."""
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
