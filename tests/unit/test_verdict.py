"""The parts of a verdict, and its text."""

from __future__ import annotations

import pytest

from gptj_convert.verification.evidence.verdict import Difference, LevelResult, Verdict, names
from gptj_model.config import GPTJConfig
from gptj_model.tensors import table

Q = "transformer.h.0.attn.q_proj.weight"
ROWS = {t.hf: t for t in table(GPTJConfig.preset("tiny"))}


def test_a_verdict_is_good_when_every_level_ran_and_passed():
    verdict = Verdict(1e-4)
    assert verdict.asked == ("structure", "weights", "logits")
    for level in verdict.asked:
        assert not verdict.ok
        verdict.levels[level] = LevelResult(True, {"n": 1})
    assert verdict.ok
    assert verdict.to_json() == {
        "levels": {level: {"ok": True, "n": 1} for level in verdict.asked},
        "first_difference": None,
        "diagnosis": [],
        "tolerance": 1e-4,
        "planned_rss_bytes": None,
    }
    verdict.levels["weights"].ok = False
    assert not verdict.ok
    verdict.levels["weights"].ok = True
    verdict.note(Difference("weights", "1", "2", names(ROWS[Q])))
    assert not verdict.ok


def test_differences_are_noted_with_their_causes_once():
    verdict = Verdict(0)
    first = Difference("structure", "a", "b", file="x.json", diagnosis="cut")
    others = [Difference("weights", "a", "b", diagnosis="shifted") for _ in range(2)]
    verdict.note(first, *others, Difference("weights", "a", "b", file="y.json"))
    assert verdict.first_difference is first
    assert verdict.differences[1:3] == others
    assert verdict.diagnosis == ["x.json: cut", "shifted"]
    assert verdict.to_json()["first_difference"]["file"] == "x.json"
    verdict.plan_memory(0)
    assert verdict.planned_memory == 0
    verdict.plan_memory(5)
    verdict.plan_memory(3)
    assert verdict.planned_memory == 5


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"tensor": names(ROWS[Q]), "file": "f"}, f"tensor {Q} ({ROWS[Q].tf})"),
        ({"file": "f", "prompt": "p"}, "file f"),
        (
            {"prompt": "p", "block": 0, "operation": "gelu"},
            "prompt 'p', first in block 0, gelu",
        ),
        ({"prompt": "", "operation": "ln_f"}, "prompt '', first in ln_f"),
        ({"prompt": "p"}, "prompt 'p'"),
        ({}, "the checkpoint"),
    ],
)
def test_a_difference_says_where(fields: dict, place: str):
    assert Difference("logits", "a", "b", **fields).place == place
