"""`gptj train --execution streaming`: the resident run, to float32 rounding, and as safe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gptj_convert.formats.bundle import BundleSource
from gptj_model.source import read_tensor
from tests.cli.test_train import MEASURED

adamw = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
BEGIN = ("train", "--init-from", "hf", "--params", "params.yaml", "--quiet")
STREAMING = ("--set", "runconfig.execution=streaming")
DROPOUT = ("model.residual_dropout_rate=0.1", "model.attention_dropout_rate=0.1",
           "model.embedding_dropout_rate=0.1")  # fmt: skip


def _rows(folder: str) -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]


def _tensors(prefix: str) -> dict[str, np.ndarray]:
    source = BundleSource(Path(prefix))
    return {name: read_tensor(source, name) for name in source.tensors}


def _settings(values) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def _assert_same_run(found: str, expected: str, step: int, tolerance: float = 2e-6) -> None:
    rows, others = _rows(found), _rows(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=tolerance * 10)
    ours, theirs = (_tensors(f"{d}/model.ckpt-{step}") for d in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(
    ("golden_run", "settings"),
    [
        ("adamw", ("optimizer.grad_accum_steps=2", *DROPOUT)),
        ("shared_embedding", ("optimizer.grad_accum_steps=2", *DROPOUT)),
        ("adamw", ("optimizer.max_gradient_norm=0", "optimizer.max_gradient_value=0.01")),
        ("shared_embedding", ("optimizer.max_gradient_norm=0",)),
        ("adamw", ("optimizer.optimizer_type=sgd",)),
        ("adamw", ("optimizer.optimizer_type=momentum", "optimizer.max_gradient_norm=0")),
        ("adamw", ("optimizer.optimizer_type=adam", "optimizer.loss_scaling_factor=dynamic")),
        ("adamw", ("optimizer.optimizer_type=rmsprop", "optimizer.loss_scaling_factor=1024")),
        ("adamw", ("model.frozen=[embedding_weights, decoder/1/]", "optimizer.epsilon=1e-4")),
    ],
    indirect=["golden_run"],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_it_is_the_resident_run(golden_run: Path, settings, gptj):
    common = (*BEGIN, *_settings(settings), "--max-steps", 4)
    assert gptj(*common, "--model-dir", "resident").code == 0
    done = gptj(*common, *STREAMING)
    assert done.code == 0, done.stderr
    _assert_same_run("model_dir", "resident", 4)
