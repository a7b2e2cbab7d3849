"""`gptj eval` and `generate`: the whole model in memory, and one block at a time, are one."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner import evaluate


@pytest.mark.parametrize("golden_run", ["adamw", "shared_embedding"], indirect=True)
@pytest.mark.parametrize("passes", ["one pass", "a pass for each batch"])
def test_streamed_metrics_are_the_resident_ones(
    golden_run: Path, passes: str, gptj, monkeypatch: pytest.MonkeyPatch
):
    if passes != "one pass":
        monkeypatch.setattr(evaluate.StreamedEvaluator.__init__, "__kwdefaults__", {"memory": 1})
    model = ("--model", "tf_model.ckpt", "--params", "params.yaml", "--json")
    resident, streamed = (
        gptj("eval", *model, "--execution", way) for way in ("resident", "streaming")
    )
    assert resident.code == streamed.code == 0, streamed.stderr
    assert streamed.json["metrics"] == pytest.approx(resident.json["metrics"], rel=1e-6)


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_number_of_batches(golden_run: Path, gptj):
    model = ("--model", "tf_model.ckpt", "--params", "params.yaml", "--json", "--eval-steps", 1)
    resident, streamed = (
        gptj("eval", *model, "--execution", way).json["metrics"]
        for way in ("resident", "streaming")
    )
    assert streamed == pytest.approx(resident, rel=1e-6)


@pytest.mark.parametrize("sampling", [(), ("--temperature", 1, "--top-k", 40, "--seed", 3)])
def test_streamed_text_is_the_resident_one(sampling: tuple, small_hf: Path, gptj):
    made = [
        gptj("generate", "--model", small_hf, "--ids", "5,7,1,9", "--max-new-tokens", 12,
             "--json", "--execution", way, *sampling).json["ids"]
        for way in ("resident", "streaming")
    ]  # fmt: skip
    assert made[0] == made[1]
    assert len(made[0]) > 4
