"""Every mutant of the model, run on intact weights, is found and located."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.cli.root import main
from tests.cli.mutants import MUTANTS, Mutant
from tests.conftest import make_checkpoint


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that is right, of a model of one block: a fault in all of them is there, too."""
    folder = tmp_path_factory.mktemp("intact")
    make_checkpoint(folder / "hf", n_layer=1)
    done = main(["convert", str(folder / "hf"), "--to", "tf", "--out", str(folder / "converted"),
                 "--quiet"])  # fmt: skip
    assert done == 0
    return folder / "converted"


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_found(mutant: Mutant, converted: Path, gptj, monkeypatch: pytest.MonkeyPatch):
    mutant.change(monkeypatch)
    done = gptj("verify", converted, "--json")
    assert done.code == 3, done.stderr
    first = done.json["first_difference"]
    assert first["level"] == "logits"
    assert (first["block"], first["operation"]) == (mutant.block, mutant.operation)
