"""On a GPU the commands give the results of the CPU; `make test-gpu` runs this."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensorflow as tf

from runner.config.execution import Execution

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tf.config.list_physical_devices("GPU"), reason="there is no GPU"),
]
executions = pytest.mark.parametrize("execution", [str(e) for e in Execution])
#: Relative: products of training are rounded to 10 bits (TF32) where the GPU can.
ROUNDED = 2e-3


def test_a_conversion_is_proven(converted: Path, gptj):
    done = gptj("verify", converted, "--level", "all", "--json")
    assert done.code == 0, done.stderr
    assert done.json["first_difference"] is None


@executions
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_recorded_run(golden_run: Path, execution: str, gptj):
    train = ("train", "--init-from", "hf", "--params", "params.yaml", "--execution", execution)
    assert gptj(*train).code == 0
    rows = Path("model_dir/metrics.jsonl").read_text().splitlines()
    recorded = json.loads(Path("reference.json").read_text())["summaries"]["loss"]
    losses = {str(row["step"]): row["loss"] for row in map(json.loads, rows)}
    assert losses == pytest.approx(recorded, rel=ROUNDED)


@executions
def test_a_prompt_is_continued(hf: Path, execution: str, gptj):
    ids = ("--ids", "5,6,7", "--max-new-tokens", "4", "--json")
    done = gptj("generate", "--model", hf, "--execution", execution, *ids)
    assert done.code == 0, done.stderr
    assert len(done.json["ids"]) == 7
