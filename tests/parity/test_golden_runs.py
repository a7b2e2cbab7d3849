"""The recorded runs of the reference, reproduced from its own YAML, records and weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.tolerances import TRAINING
from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_model.source import read_tensor
from tests.conftest import GOLDEN_RUNS

#: The short form runs the first.
one_and_both = pytest.mark.parametrize(
    "golden_run",
    ["adamw", pytest.param("shared_embedding", marks=pytest.mark.full)],
    indirect=True,
)
both = pytest.mark.parametrize("golden_run", ["adamw", "shared_embedding"], indirect=True)
sources = pytest.mark.parametrize("source", ["hf", "tf_model.ckpt"])


def _recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "reference.json").read_text())


def _metrics_line(recorded: list) -> dict[str, float]:
    pairs = (item.split(" = ") for item in recorded[1].split(", "))
    return {k: float(v) for k, v in pairs if k != "global_step"}


def _rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = BundleSource(found), BundleSource(expected)
    assert set(ours.tensors) == set(theirs.tensors)
    for name in theirs.tensors:
        delta = np.abs(read_tensor(ours, name).astype(float) - read_tensor(theirs, name))
        assert delta.max() <= TRAINING, name


@both
@sources
def test_evaluation_before_training(golden_run: Path, source: str, gptj):
    done = gptj("eval", "--model", source, "--params", "params.yaml", "--json")
    assert done.code == 0
    expected = _metrics_line(_recorded(golden_run)["eval_before_training"])
    assert done.json["metrics"] == pytest.approx(expected, rel=TRAINING)
    in_float64 = json.loads((golden_run / "hf_eval.json").read_text())
    perplexity = math.exp(in_float64["token_mean_loss"])
    assert done.json["metrics"]["eval/lm_perplexity"] == pytest.approx(perplexity, rel=TRAINING)


@pytest.mark.parametrize(
    ("golden_run", "source"),
    [
        ("adamw", "hf"),
        ("shared_embedding", "tf_model.ckpt"),
        pytest.param("adamw", "tf_model.ckpt", marks=pytest.mark.full),
        pytest.param("shared_embedding", "hf", marks=pytest.mark.full),
    ],
    indirect=["golden_run"],
)
def test_twenty_steps(golden_run: Path, source: str, gptj):
    done = gptj("train", "--init-from", source, "--params", "params.yaml", "--json")
    assert done.code == 0
    recorded = _recorded(golden_run)
    rows = _rows(golden_run / "model_dir")
    assert [row["step"] for row in rows] == list(range(1, 21))
    for key, tag in (
        ("loss", "loss"),
        ("learning_rate", "train/lr"),
        ("unclipped_grad_norm", "train/unclipped_grad_norm"),
    ):
        expected = [recorded["summaries"][tag][str(row["step"])] for row in rows]
        assert [row[key] for row in rows] == pytest.approx(expected, rel=TRAINING), key
    _assert_same_weights(Path("model_dir/model.ckpt-20"), golden_run / "ckpt/model.ckpt-20")

    after = gptj("eval", "--json")
    expected = _metrics_line(recorded["eval_after_training"])
    assert after.json["metrics"] == pytest.approx(expected, rel=TRAINING)


@one_and_both
def test_the_references_own_checkpoint_resumes(golden_run: Path, gptj):
    """The reference's model.ckpt-20 in model_dir, and ours, give the same five further steps."""
    common = ("--params", "params.yaml", "--max-steps", 25, "--quiet")
    assert gptj("train", "--init-from", "hf", "--model-dir", "ours", *common).code == 0
    (golden_run / "ckpt").rename(golden_run / "theirs")
    assert gptj("train", "--model-dir", "theirs", *common).code == 0
    ours, theirs = _rows(Path("ours"))[20:], _rows(Path("theirs"))
    assert [row["step"] for row in theirs] == list(range(21, 26))
    for mine, other in zip(ours, theirs, strict=True):
        assert other["loss"] == pytest.approx(mine["loss"], rel=TRAINING)
    _assert_same_weights(Path("ours/model.ckpt-25"), Path("theirs/model.ckpt-25"))


@one_and_both
def test_the_references_summaries_are_written(golden_run: Path, gptj):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gptj("train", "--init-from", "hf", "--params", "params.yaml", "--max-steps", 2, "--quiet")
    events = EventAccumulator("model_dir")
    events.Reload()
    recorded = {t for t in _recorded(golden_run)["summaries"] if t != "global_step/sec"}
    assert set(events.Tags()["tensors"]) == recorded


#: What the CS client's recorded run has that `adamw/params.yaml` has not: its norms are not
#: decayed, its rate is one number.
CLIENTS = {
    "learning_rate": 1e-3,
    "exclude_from_weight_decay": ["ln_1", "layer_norm", "bias"],
}


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_the_clients_run_and_its_checkpoint(golden_run: Path, gptj):
    """The client's twenty steps end on our weights and moments, and we resume from either."""
    common = ["--params", "params.yaml", "--max-steps", 21, "--quiet"]
    for key, value in CLIENTS.items():
        common += ["--set", f"optimizer.{key}={json.dumps(value)}"]
    common += ["--set", "runconfig.save_checkpoints_steps=20"]
    theirs = GOLDEN_RUNS / "cs"
    assert gptj("train", "--init-from", theirs, "--model-dir", "ours", *common).code == 0
    home = ("convert", theirs / "checkpoint_20.mdl", "--to", "tf", "--out", "home", "--quiet")
    assert gptj(*home, "--optimizer-state").code == 0
    _assert_same_weights(Path("ours/model.ckpt-20"), Path("home/tf_model.ckpt"))

    done = gptj("train", "--init-from", theirs / "checkpoint_20.mdl", *common)
    assert done.code == 0, done.stderr
    assert [row["step"] for row in _rows(Path("model_dir"))] == [21]
    _assert_same_weights(Path("ours/model.ckpt-21"), Path("model_dir/model.ckpt-21"))
