"""`gptj train --execution streaming`: the resident run, to float32 rounding, and as safe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_convert.resources import machine
from gptj_model.source import read_tensor
from runner.training.streamed import state
from tests.cli.rewriting import rewrite_bundle
from tests.cli.test_train import MEASURED
from tests.conftest import load_tensors, save_tensors

adamw = pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
BEGIN = ("train", "--init-from", "hf", "--params", "params.yaml", "--quiet")
STREAMING = ("--execution", "streaming")
DROPOUT = ("model.residual_dropout_rate=0.1", "model.attention_dropout_rate=0.1",
           "model.embedding_dropout_rate=0.1")  # fmt: skip
NOT_BY_NORM = "optimizer.max_gradient_norm=0"
#: Most of a test is compiling: the others are for the whole suite.
full = pytest.mark.full


def _rows(folder: str) -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]


def _tensors(prefix: str) -> dict[str, np.ndarray]:
    source = BundleSource(Path(prefix))
    return {name: read_tensor(source, name) for name in source.tensors}


def _settings(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def _assert_same_run(found: str, expected: str, step: int) -> None:
    """Check equality up to float32 rounding."""
    rows, others = _rows(found), _rows(expected)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=2e-6)
    ours, theirs = (_tensors(f"{d}/model.ckpt-{step}") for d in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=2e-6, err_msg=name)


@full
@pytest.mark.parametrize(
    ("golden_run", "settings"),
    [
        ("shared_embedding", ("optimizer.loss_scaling_factor=1024", NOT_BY_NORM, DROPOUT[0])),
        (
            "adamw",
            ("optimizer.optimizer_type=rmsprop", "model.frozen=[embedding_weights, decoder/1/]"),
        ),
        ("shared_embedding", ("optimizer.grad_accum_steps=2", *DROPOUT)),
        ("adamw", (NOT_BY_NORM, "optimizer.max_gradient_value=0.01", *DROPOUT)),
        ("adamw", ("optimizer.optimizer_type=sgd",)),
        ("adamw", ("optimizer.optimizer_type=momentum", NOT_BY_NORM)),
        ("adamw", ("optimizer.optimizer_type=adam", "optimizer.loss_scaling_factor=dynamic")),
    ],
    indirect=["golden_run"],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_it_is_the_resident_run(golden_run: Path, settings, gptj):
    common = (*BEGIN, *_settings(*settings), "--max-steps", 3)
    assert gptj(*common, "--model-dir", "resident").code == 0
    done = gptj(*common, *STREAMING)
    assert done.code == 0, done.stderr
    _assert_same_run("model_dir", "resident", 3)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [("bfloat16", 2e-2), pytest.param("float16", 2e-3, marks=full)]
)
@pytest.mark.parametrize("golden_run", ["shared_embedding"], indirect=True)
def test_16_bits_are_the_resident_run_to_their_own_rounding(
    golden_run: Path, dtype: str, rounding: float, gptj
):
    """The head is tied, and each block is updated as soon as its gradients exist."""
    mixed = _settings("model.mixed_precision=true", f"model.mixed_precision_dtype={dtype}",
                      "optimizer.loss_scaling_factor=dynamic", NOT_BY_NORM,
                      DROPOUT[0])  # fmt: skip
    common = (*BEGIN, *mixed, "--max-steps", 3)
    assert gptj(*common, "--model-dir", "resident").code == 0
    assert gptj(*common, *STREAMING).code == 0
    for row, other in zip(_rows("model_dir"), _rows("resident"), strict=True):
        assert row == pytest.approx(other, rel=rounding)


@full
@adamw
def test_recomputed_blocks_have_the_same_masks(golden_run: Path, gptj):
    common = (*BEGIN, *_settings("optimizer.grad_accum_steps=2", *DROPOUT), "--max-steps", 3)
    assert gptj(*common, "--model-dir", "kept").code == 0
    assert gptj(*common, *_settings("model.recompute=true")).code == 0
    _assert_same_run("model_dir", "kept", 3)


@pytest.mark.parametrize("source", ["half", pytest.param("tf_model.ckpt", marks=full)])
@adamw
def test_an_adapter_of_a_model_that_is_read_only(golden_run: Path, source: str, gptj):
    """As stored: the resident run of the same weights, also in two parts; those are the run in one
    bit for bit, which the longer form sees."""
    half = {k: v.astype(np.float16) for k, v in load_tensors(Path("hf/model.safetensors")).items()}
    shutil.copytree("hf", "half")
    save_tensors(Path("half/model.safetensors"), half)
    lora = _settings("model.lora.rank=4", "model.lora.targets=[q_proj, fc_out]", DROPOUT[0],
                     "optimizer.grad_accum_steps=2", "optimizer.learning_rate=0.01",
                     "train_input.shuffle=true")  # fmt: skip
    begin = ("train", "--init-from", source, "--params", "params.yaml", "--quiet", *lora)
    assert gptj(*begin, "--max-steps", 4, "--model-dir", "resident").code == 0
    assert gptj(*begin, "--max-steps", 2, *STREAMING).code == 0
    assert gptj("train", "--max-steps", 4, "--quiet").code == 0
    _assert_same_run("model_dir", "resident", 4)
    if source == "half":
        return
    assert gptj(*begin, "--max-steps", 4, "--model-dir", "whole", *STREAMING).code == 0
    assert _rows("model_dir") == _rows("whole")
    found, expected = _tensors("model_dir/model.ckpt-4"), _tensors("whole/model.ckpt-4")
    assert all(np.array_equal(found[name], expected[name]) for name in found | expected)


@full
@pytest.mark.parametrize("golden_run", ["shared_embedding"], indirect=True)
def test_either_executor_continues_the_others_run(golden_run: Path, gptj):
    """A run starts from a bundle directly: no first state is written."""
    begin = ("train", "--init-from", "tf_model.ckpt", "--params", "params.yaml", "--quiet")
    assert gptj(*begin, "--max-steps", 3, "--model-dir", "resident").code == 0
    assert gptj(*begin, "--max-steps", 1, *STREAMING).code == 0
    for step, execution in ((2, "resident"), (3, "streaming")):
        done = gptj("train", "--max-steps", step, "--execution", execution, "--json", "--quiet")
        assert (done.code, done.json["step"]) == (0, step)
    _assert_same_run("model_dir", "resident", 3)
    # How it was trained is how it is evaluated, if nothing else is said.
    assert gptj("eval").stdout == gptj("eval", "--execution", "streaming").stdout


@adamw
def test_a_run_in_two_parts_is_the_run_in_one_bit_for_bit(golden_run: Path, gptj):
    """Streamed and resident runs agree, including evaluations between their steps."""
    # The masks of the second batch are not those of the first, in recomputed blocks too.
    more = _settings("train_input.shuffle=true", *DROPOUT, "runconfig.save_checkpoints_steps=2",
                     "runconfig.keep_checkpoint_max=2", "optimizer.grad_accum_steps=2",
                     "model.recompute=true")  # fmt: skip
    evaluated = ("--mode", "train_and_eval", "--max-steps")
    assert gptj(*BEGIN, *more, *evaluated, 5, "--model-dir", "resident").code == 0
    begin = (*BEGIN, *STREAMING, *more)
    assert gptj(*begin, *evaluated, 5, "--model-dir", "whole").code == 0
    _assert_same_run("whole", "resident", 5)
    assert gptj(*begin, *evaluated, 3).code == 0
    assert sorted(p.name for p in Path("model_dir").glob("*.index")) == [
        "model.ckpt-2.index",
        "model.ckpt-3.index",
    ]
    assert gptj("train", *evaluated, 5, "--quiet").code == 0
    at_the_end_of_the_first = [r for r in _rows("model_dir") if "loss" not in r and r["step"] == 3]
    assert len(at_the_end_of_the_first) == 1
    rows = [row for row in _rows("model_dir") if row not in at_the_end_of_the_first]
    assert rows == _rows("whole")
    found, expected = _tensors("model_dir/model.ckpt-5"), _tensors("whole/model.ckpt-5")
    assert found.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name
    for folder in ("model_dir", "whole"):
        assert sorted(p.name for p in Path(folder).glob("*.index")) == [
            "model.ckpt-4.index",
            "model.ckpt-5.index",
        ]
        assert not list(Path(folder).glob(".partial-*"))


NARROW = _settings("optimizer.moments_dtype=bfloat16")
#: Relative, of losses in 8 steps, of which float32 differs by 2e-6.
MOMENTS = 1e-5


def _assert_near_the_recording(folder: str, golden_run: Path) -> None:
    recorded = json.loads((golden_run / "reference.json").read_text())["train_loss_logged"]
    rows = _rows(folder)
    expected = [recorded[str(row["step"] - 1)] for row in rows]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=MOMENTS)


def _slot_dtypes(prefix: str) -> set[str]:
    tensors = BundleSource(Path(prefix)).tensors
    return {info.dtype for name, info in tensors.items() if name.endswith(("/AdamW", "/AdamW_1"))}


def _update_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "PIECE", 2**12)
    monkeypatch.setattr(state, "_UPDATED", 2**10)


@adamw
def test_moments_in_16_bits_are_as_good_and_the_same_after_an_interruption(
    golden_run: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    """The size of the pieces that are updated at once makes no difference."""
    refused = gptj(*BEGIN, *NARROW)
    assert (refused.code, list(Path("model_dir").glob("*ckpt*"))) == (2, [])
    assert "optimizer.moments_dtype" in refused.stderr
    begin = (*BEGIN, *STREAMING, *NARROW, "--max-steps")
    assert gptj(*begin, 8, "--model-dir", "whole").code == 0
    _assert_near_the_recording("whole", golden_run)
    _update_in_small_pieces(monkeypatch)
    assert gptj(*begin, 5).code == 0
    assert gptj("train", "--max-steps", 8, "--quiet").code == 0
    found, expected = _tensors("model_dir/model.ckpt-8"), _tensors("whole/model.ckpt-8")
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name
    assert _slot_dtypes("whole/model.ckpt-8") == {"bfloat16"}


@adamw
def test_a_moment_that_fades_away_becomes_zero(golden_run: Path, gptj):
    """Denormal numbers would slow down every later step."""
    least = np.finfo(np.float32).tiny

    def fade(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.endswith("/AdamW"):
                tensors[name].fill(least)  # times beta1 it is denormal

    assert gptj(*BEGIN, "--max-steps", 1).code == 0
    rewrite_bundle(Path("model_dir"), fade, name="model.ckpt-1")
    assert gptj("train", *STREAMING, "--max-steps", 2, "--quiet").code == 0
    after = _tensors("model_dir/model.ckpt-2")
    (embedding,) = (after[n] for n in after if "embedding" in n and n.endswith("/AdamW"))
    assert (embedding == 0).any()  # of tokens that did not come
    assert np.abs(embedding[embedding != 0]).min() >= least


@full
@adamw
def test_every_executor_resumes_with_moments_in_16_bits(
    golden_run: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    _update_in_small_pieces(monkeypatch)
    wide = _settings("optimizer.moments_dtype=float32")
    assert gptj(*BEGIN, *STREAMING, *NARROW, "--max-steps", 3).code == 0
    for step, execution, values, dtype in (
        (5, "resident", wide, "float32"),
        (6, "streaming", NARROW, "bfloat16"),
        (8, "streaming", wide, "float32"),
    ):
        onward = ("train", "--execution", execution, "--max-steps", step, "--quiet", *values)
        done = gptj(*onward)
        assert done.code == 0, done.stderr
        assert _slot_dtypes(f"model_dir/model.ckpt-{step}") == {dtype}
    _assert_near_the_recording("model_dir", golden_run)


@adamw
def test_the_need_is_printed_first_and_a_small_disk_is_refused(
    golden_run: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    common = (*BEGIN, *STREAMING, *_settings("runconfig.keep_checkpoint_max=1"), "--max-steps", 1)
    done = gptj(*common, "--dry-run", "--json")
    parameters, states = 214_976, 4 * 128 * 64 * 4
    waiting = 4 * (parameters - 512 * 64 - 49_600)  # but for the embedding and one block
    assert done.json["execution"] == "streaming"
    half = gptj(*common, *_settings("optimizer.moments_dtype=bfloat16"), "--dry-run", "--json")
    assert half.json["written_bytes"] == 8 * parameters + waiting
    assert done.json["disk_bytes"] == 2 * 12 * parameters + waiting + states
    assert done.json["written_bytes"] == 12 * parameters + waiting
    assert "checkpoints" in gptj(*common, "--dry-run").stdout
    assert not Path("model_dir").exists()
    monkeypatch.setattr(machine, "disk_free", lambda folder: done.json["disk_bytes"] - 1)
    refused = gptj(*common)
    assert refused.code == 1
    assert "keep_checkpoint_max" in refused.stderr
    assert not list(Path("model_dir").glob("*ckpt*"))
