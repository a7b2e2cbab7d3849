"""`gptj verify`: healthy conversions pass, every damage is found and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_convert.options import levels_up_to
from gptj_convert.streams.progress import finish
from gptj_convert.verification.evidence.verdict import Verdict
from gptj_convert.verification.verify import verify
from gptj_model.config import GPTJConfig
from gptj_model.op import Op
from gptj_model.tensors import table
from tests.cli.rewriting import rewrite_bundle
from tests.conftest import GOLDEN_RUNS, SMALL, load_tensors, make_checkpoint, save_tensors

CONFIG = GPTJConfig.preset("tiny", **SMALL)
MATRICES = [t for t in table(CONFIG) if t.tf_op is Op.TRANSPOSE and t.shape[0] == t.shape[1]]


def _first(done, level: str) -> dict:
    assert done.code == 3, done.stderr
    assert done.json["ok"] is False
    first = done.json["first_difference"]
    assert first["level"] == level
    return first


def test_a_healthy_conversion_passes_every_level(converted: Path, small_pieces: None, gptj):
    done = gptj("verify", "--tolerance", "1e-4", "--json")
    assert done.code == 0
    assert done.json["first_difference"] is None
    assert {k: v["ok"] for k, v in done.json["levels"].items()} == {
        "structure": True,
        "weights": True,
        "logits": True,
    }
    assert done.json["levels"]["logits"]["relative"] < 1e-5
    names = [row["name"] for row in done.json["levels"]["logits"]["prompts"]]
    assert {"one token", "text", "ids from both ends", "window at 2032"} <= set(names)
    text = next(r for r in done.json["levels"]["logits"]["prompts"] if r["name"] == "text")
    assert text["tokens"] > 500
    assert text["top1"] == 1.0


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.full), "bfloat16"])
def test_rounding_alone_never_fails(dtype: str, hf: Path, gptj):
    assert gptj("convert", hf, "--to", "tf", "--dtype", dtype).code == 0
    assert gptj("verify").code == 0


def test_a_tied_model_passes(workdir: Path, gptj):
    make_checkpoint(workdir / "hf", tie_word_embeddings=True)
    assert gptj("convert", "hf", "--to", "tf").code == 0
    assert gptj("verify").code == 0


def test_the_way_back_is_verified_too(converted: Path, gptj):
    assert gptj("convert", converted, "--to", "hf").code == 0
    assert gptj("verify", "converted-hf").code == 0
    assert gptj("verify", "converted-hf", "--against", "hf", "--level", "weights").code == 0


def test_the_references_own_bundle_passes(workdir: Path, gptj):
    folder = GOLDEN_RUNS / "adamw"
    assert gptj("verify", folder / "tf_model.ckpt", "--against", folder / "hf").code == 0


@pytest.mark.parametrize("tensor", MATRICES, ids=lambda t: t.hf)
def test_an_untransposed_square_projection(tensor, converted: Path, gptj):
    rewrite_bundle(converted, lambda t: t.update({tensor.tf: t[tensor.tf].T}))
    first = _first(gptj("verify", "--against", "hf", "--json"), "weights")
    assert first["tensor"] == {"hf": tensor.hf, "tf": tensor.tf, "cs": tensor.cs[0]}
    assert first["diagnosis"] == "the transposition was skipped"


def test_a_person_reads_both_names(converted: Path, gptj):
    name = MATRICES[1].tf
    rewrite_bundle(converted, lambda t: t.update({name: t[name].T}))
    done = gptj("verify", "--against", "hf")
    assert done.code == 3
    assert f"MISMATCH in tensor {MATRICES[1].hf} ({name})" in done.stdout


def _swap(a: str, b: str):
    return lambda t: t.update({a: t[b], b: t[a]})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            _swap("gptj_decoder/1/attn/q_proj/q_proj/kernel",
                  "gptj_decoder/1/attn/k_proj/k_proj/kernel"),
            "transformer.h.1.attn.q_proj.weight",
        ),
        (
            _swap("gptj_decoder/0/ln_1/ln_1/gamma", "gptj_decoder/2/ln_1/ln_1/gamma"),
            "transformer.h.0.ln_1.weight",
        ),
        (
            lambda t: t.update({"lm_head/lm_head/bias": t["lm_head/lm_head/bias"] * 0}),
            "lm_head.bias",
        ),
        (
            lambda t: t.update(
                {"input_embedding/embedding_weights":
                 np.roll(t["input_embedding/embedding_weights"], 1, axis=0)}
            ),
            "transformer.wte.weight",
        ),
    ],
    ids=["q and k swapped", "two layers swapped", "bias zeroed", "rows shifted"],
)  # fmt: skip
def test_tensors_exchanged_or_changed(change, named: str, converted: Path, gptj):
    rewrite_bundle(converted, change)
    first = _first(gptj("verify", "--against", "hf", "--level", "weights", "--json"), "weights")
    assert first["tensor"]["hf"] == named


def test_one_unit_in_the_last_place(converted: Path, small_pieces: None, gptj):
    def nudge(tensors) -> None:
        values = tensors["gptj_decoder/2/mlp/dense_layer_5/dense_layer_5/kernel"]
        values[100, 7] = np.nextafter(values[100, 7], np.float32(9))

    rewrite_bundle(converted, nudge)
    first = _first(gptj("verify", "--against", "hf", "--json"), "weights")
    assert first["tensor"]["hf"] == "transformer.h.2.mlp.fc_out.weight"
    assert "first at [7, 100]" in first["found"]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_bit_of_any_tensor(data, converted: Path, gptj):
    source = BundleSource(converted / "tf_model.ckpt")
    tensor = data.draw(st.sampled_from(table(CONFIG)))
    entry = source.entries[tensor.tf]
    source.close()
    at = entry.offset + data.draw(st.integers(0, entry.info.nbytes - 1))
    path = converted / "tf_model.ckpt.data-00000-of-00001"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        done = gptj("verify", "--level", "weights", "--json")
        assert _first(done, "weights")["tensor"]["hf"] == tensor.hf
    finally:
        raw_back = bytearray(raw)
        raw_back[at] = _original(tensor, at - entry.offset)
        path.write_bytes(raw_back)


def _original(tensor, offset: int) -> int:
    values = load_tensors(Path("hf/model.safetensors"))[tensor.hf]
    from gptj_model.tensors import Scheme

    return np.ascontiguousarray(tensor.op(Scheme.HF, Scheme.TF)(values)).tobytes()[offset]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rotary_dim", 4), ("layer_norm_epsilon", 1e-6), ("n_head", 6), ("n_positions", 1024)],
)
def test_a_config_that_computes_otherwise(field: str, value, converted: Path, gptj):
    path = converted / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    first = _first(gptj("verify", "--level", "structure", "--json"), "structure")
    assert f"{field} = {value!r}" in first["found"]


@pytest.mark.parametrize("name", ["tf_model.ckpt.index", "tf_model.ckpt.data-00000-of-00001"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_files_cut_or_missing(name: str, damage: str, converted: Path, gptj):
    path = converted / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    done = gptj("verify", "--json")
    assert done.code == 3
    assert "tf_model.ckpt" in done.json["first_difference"]["found"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_differs_from_the_manifest(name: str, converted: Path, gptj):
    path = converted / name
    path.write_text(path.read_text() + " ")
    done = gptj("verify", "--level", "weights", "--json")
    assert done.code == 3
    assert done.json["first_difference"]["file"] == name
    assert done.json["levels"]["weights"]["ok"] is True


def test_a_missing_tensor(converted: Path, gptj):
    rewrite_bundle(converted, lambda t: t.pop("gptj_decoder/1/ln_1/ln_1/beta"))
    first = _first(gptj("verify", "--against", "hf", "--json"), "structure")
    assert "gptj_decoder/1/ln_1/ln_1/beta" in first["found"]


def test_training_state_is_not_compared(converted: Path, gptj):
    def train(tensors) -> None:
        tensors["lm_head/lm_head/bias/AdamW"] = tensors["lm_head/lm_head/bias"] * 0
        tensors["beta1_power"] = np.float32(0.9)

    rewrite_bundle(converted, train)
    assert gptj("verify", "--against", "hf", "--level", "weights").code == 0


def test_nothing_to_be_judged(workdir: Path, gptj):
    done = gptj("verify", "nowhere")
    assert done.code == 1
    assert "nowhere: not found" in done.stderr


def test_a_missing_source_proves_nothing(converted: Path, hf: Path, gptj):
    (hf / "model.safetensors").unlink()
    assert gptj("verify").code == 1


def test_no_manifest_asks_for_the_source(converted: Path, gptj):
    (converted / "manifest.json").unlink()
    done = gptj("verify")
    assert done.code == 2
    assert "--against" in done.stderr


@pytest.mark.parametrize("text", ["{", '{"source": [1], "target": {}, "files": {}, "tensors": {}}'])
def test_a_damaged_manifest(text: str, converted: Path, gptj):
    (converted / "manifest.json").write_text(text)
    done = gptj("verify", "--against", "hf", "--level", "weights", "--json")
    assert done.code == 3
    assert done.json["first_difference"]["file"] == "manifest.json"
    assert gptj("verify").code == 1


def test_nothing_to_verify(workdir: Path, gptj):
    done = gptj("verify", "--against", "hf")
    assert done.code == 1


def test_nan_weights_are_equal_bit_for_bit_but_cannot_be_judged(hf: Path, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    tensors["transformer.h.1.ln_1.weight"][2] = np.nan
    save_tensors(hf / "model.safetensors", tensors)
    assert gptj("convert", hf, "--to", "tf").code == 0
    done = gptj("verify", "--level", "weights", "--json")
    assert done.code == 0
    assert done.json["levels"]["weights"]["nonfinite_values"] == 1
    assert gptj("verify").code == 1


def test_a_changed_source_proves_nothing(converted: Path, hf: Path, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    tensors["transformer.h.1.ln_1.weight"][2] += 1
    save_tensors(hf / "model.safetensors", tensors)
    done = gptj("verify", "--level", "weights", "--json")
    assert done.code == 1
    assert "has changed since it was converted" in done.json["error"]["message"]
    shutil.rmtree(hf)
    make_checkpoint(hf, n_layer=2)
    assert gptj("verify").code == 1


def test_figures_of_what_differs(converted: Path, small_pieces: None, gptj):
    def damage(tensors) -> None:
        kernel = tensors["gptj_decoder/1/mlp/dense_layer_2/dense_layer_2/kernel"]
        kernel[2, 5] += 3
        kernel[7, 4] = np.inf
        kernel[3, 5] = np.nan
        tensors["gptj_decoder/0/ln_1/ln_1/beta"][:] = 0
        for name in ("gamma", "beta"):
            tensors[f"gptj_decoder/2/ln_1/ln_1/{name}"] = tensors[
                f"gptj_decoder/1/ln_1/ln_1/{name}"
            ]

    rewrite_bundle(converted, damage)
    done = gptj("verify", "--against", "hf", "--level", "weights", "--json")
    assert done.code == 3
    weights = done.json["levels"]["weights"]
    assert (weights["tensors"], weights["differing"]) == (35, 4)
    found = {f["hf"]: f for f in weights["findings"]}
    fc_in = found["transformer.h.1.mlp.fc_in.weight"]
    assert (fc_in["values"], fc_in["differing"], fc_in["first"]) == (48 * 192, 3, [5, 2])
    assert fc_in["max_abs"] == pytest.approx(3)
    assert fc_in["found"] == pytest.approx(fc_in["expected"] + 3)
    assert fc_in["diagnosis"] == "only 2 rows from 4 to 5 differ"
    assert weights["nonfinite"] == {fc_in["hf"]: {"found": 2, "expected": 0}}
    assert weights["nonfinite_values"] == 0
    assert weights["zero"] == ["transformer.h.0.ln_1.bias"]
    assert weights["duplicates"] == [
        [f"transformer.h.{i}.ln_1.{part}" for i in (1, 2)] for part in ("weight", "bias")
    ]
    done = gptj("verify", "--against", "hf", "--level", "weights")
    assert "note: transformer.h.0.ln_1.bias is all zero" in done.stderr
    assert "transformer.h.1.ln_1.bias, transformer.h.2.ln_1.bias" in done.stderr
    assert "diagnosis: transformer.h.0.ln_1.bias: all values are zero" in done.stdout


def test_what_the_source_has_too_is_no_finding(workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf")
    tensors = load_tensors(hf / "model.safetensors")
    tensors["lm_head.bias"] *= 0
    for i in (1, 2):
        tensors[f"transformer.h.{i}.ln_1.weight"] = tensors["transformer.h.0.ln_1.weight"]
    save_tensors(hf / "model.safetensors", tensors)
    assert gptj("convert", hf, "--to", "tf").code == 0
    done = gptj("verify", "--level", "weights", "--json")
    assert done.code == 0
    assert done.json["levels"]["weights"]["zero"] == []
    assert done.json["levels"]["weights"]["duplicates"] == []


def test_values_that_a_narrow_dtype_makes_zero_are_reported(workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf")
    tensors = load_tensors(hf / "model.safetensors")
    tensors["lm_head.bias"] *= 1e-9
    save_tensors(hf / "model.safetensors", tensors)
    assert gptj("convert", hf, "--to", "tf", "--dtype", "float16").code == 0
    done = gptj("verify", "--level", "weights", "--json")
    assert done.code == 0
    assert done.json["levels"]["weights"]["zero"] == ["lm_head.bias"]


def test_large_files_are_hashed_with_the_weights(workdir: Path, monkeypatch, gptj):
    monkeypatch.setattr("gptj_convert.files.digest._PIECE", 300)  # many pieces, as of a large file
    make_checkpoint(workdir / "hf", vocab_size=3001)
    assert gptj("convert", "hf", "--to", "hf").code == 0
    assert gptj("verify", "converted-hf", "--level", "weights").code == 0
    path = Path("converted-hf/model.safetensors")
    assert path.stat().st_size > 2**20
    # A byte that no tensor holds: safetensors pads its header with spaces.
    raw = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    assert raw[end - 1 : end] == b" "
    raw[end - 1 : end] = b"\n"
    path.write_bytes(raw)
    done = gptj("verify", "converted-hf", "--level", "weights", "--json")
    assert done.code == 3
    assert not done.json["levels"]["weights"]["ok"]
    first = done.json["first_difference"]
    assert (first["level"], first["file"]) == ("weights", path.name)
    assert first["diagnosis"] == "it was changed after it was written"


def test_keep_going_runs_what_can_be_run(converted: Path, gptj):
    kernel = "gptj_decoder/1/attn/q_proj/q_proj/kernel"
    rewrite_bundle(converted, lambda t: t.update({kernel: t[kernel].T}))
    config = converted / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rotary_dim": 4}))
    done = gptj("verify", "--against", "hf", "--json")
    assert done.code == 3
    assert list(done.json["levels"]) == ["structure"]
    done = gptj("verify", "--against", "hf", "--keep-going", "--json")
    assert done.code == 3
    assert {k: v["ok"] for k, v in done.json["levels"].items()} == {
        "structure": False,
        "weights": False,
        "logits": False,
    }
    assert done.json["first_difference"]["file"] == "config.json"
    assert done.json["levels"]["weights"]["findings"][0]["tf"] == kernel
    assert done.json["levels"]["logits"]["relative"] > 1e-4


def test_keep_going_says_what_cannot_be_run(converted: Path, gptj):
    rewrite_bundle(converted, lambda t: t.pop("gptj_decoder/1/ln_1/ln_1/beta"))
    done = gptj("verify", "--against", "hf", "--keep-going", "--json")
    assert done.code == 3
    weights, logits = (done.json["levels"][name] for name in ("weights", "logits"))
    assert (weights["ok"], weights["tensors"], weights["differing"]) == (False, 34, 0)
    assert weights["not_compared"] == ["transformer.h.1.ln_1.bias"]
    assert not logits["ok"]
    assert "ln_1/beta" in logits["not_run"]
    (converted / "tf_model.ckpt.index").unlink()
    done = gptj("verify", "--against", "hf", "--keep-going")
    assert done.code == 3
    assert "logits     not run: the checkpoint cannot be opened" in done.stdout


def test_products_have_all_of_float32(converted: Path, gptj):
    """GPUs would otherwise round products to 10 bits, which no tolerance allows."""
    rounding = tf.config.experimental
    rounding.enable_tensor_float_32_execution(True)
    try:
        assert gptj("verify").code == 0
        assert not rounding.tensor_float_32_execution_enabled()
    finally:
        rounding.enable_tensor_float_32_execution(True)


def test_an_unfinished_verification_is_not_ok(converted: Path):
    assert not Verdict(1e-4, levels_up_to("weights")).ok
    work = verify(converted, Path("hf"), tolerance=1e-4, level="weights")
    next(work)
    work.close()
    assert finish(verify(converted, Path("hf"), tolerance=1e-4, level="weights")).ok


@pytest.mark.parametrize("closed", ["pipe", "descriptor", "full"])
def test_a_verdict_that_nobody_can_read_is_not_ok(closed: str, converted: Path):
    command = f"{sys.executable} -m runner.cli.root verify --level weights --json"
    if closed == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command.split(), stdout=writing, stderr=subprocess.PIPE, text=True)
        os.close(writing)
    else:
        end = ">&-" if closed == "descriptor" else "> /dev/full"
        done = subprocess.run(f"{command} {end}", shell=True, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "a fault in gptj itself" not in done.stderr


@pytest.mark.parametrize("tolerance", ["0", "-1", "nonsense"])
def test_a_tolerance_that_is_none(tolerance: str, converted: Path, gptj):
    assert gptj("verify", "--tolerance", tolerance).code == 2
