"""Every mutant of the model, run on intact weights, is found and located."""

from __future__ import annotations

import pytest

from tests.cli.mutants import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_found(mutant: Mutant, converted, gptj, monkeypatch: pytest.MonkeyPatch):
    mutant.change(monkeypatch)
    done = gptj("verify", "--json")
    assert done.code == 3, done.stderr
    first = done.json["first_difference"]
    assert first["level"] == "logits"
    assert (first["block"], first["operation"]) == (mutant.block, mutant.operation)
