"""`gptj verify`: healthy conversions pass, every damage is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.bundle import BundleSource, write_bundle
from gptj_model.config import GPTJConfig
from gptj_model.source import read_tensor
from gptj_model.tensors import Op, table
from tests.conftest import GOLDEN_RUNS, SMALL, load_tensors, make_checkpoint, save_tensors

CONFIG = GPTJConfig.preset("tiny", **SMALL)
MATRICES = [t for t in table(CONFIG) if t.tf_op is Op.TRANSPOSE and t.shape[0] == t.shape[1]]


def _rewrite(folder: Path, change) -> None:
    """Change the tensors of a bundle as a faulty converter would: whole, with right checksums."""
    prefix = folder / "tf_model.ckpt"
    source = BundleSource(prefix)
    tensors = {name: read_tensor(source, name) for name in source.tensors}
    source.close()
    change(tensors)
    for path in folder.glob("tf_model.ckpt.*"):
        path.unlink()
    write_bundle(prefix, tensors)
    (folder / "manifest.json").unlink()


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
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
    _rewrite(converted, lambda t: t.update({tensor.tf: t[tensor.tf].T}))
    first = _first(gptj("verify", "--against", "hf", "--json"), "weights")
    assert first["tensor"] == {"hf": tensor.hf, "tf": tensor.tf, "cs": tensor.cs[0]}
    assert "transposition was skipped" in first["found"]


def test_a_person_reads_both_names(converted: Path, gptj):
    name = MATRICES[1].tf
    _rewrite(converted, lambda t: t.update({name: t[name].T}))
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
    _rewrite(converted, change)
    first = _first(gptj("verify", "--against", "hf", "--level", "weights", "--json"), "weights")
    assert first["tensor"]["hf"] == named


def test_one_unit_in_the_last_place(converted: Path, small_pieces: None, gptj):
    def nudge(tensors) -> None:
        values = tensors["gptj_decoder/2/mlp/dense_layer_5/dense_layer_5/kernel"]
        values[100, 7] = np.nextafter(values[100, 7], np.float32(9))

    _rewrite(converted, nudge)
    first = _first(gptj("verify", "--against", "hf", "--json"), "weights")
    assert first["tensor"]["hf"] == "transformer.h.2.mlp.fc_out.weight"
    assert "first at [100, 7]" in first["found"]


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
def test_a_file_that_the_manifest_knows_otherwise(name: str, converted: Path, gptj):
    path = converted / name
    path.write_text(path.read_text() + " ")
    done = gptj("verify", "--level", "weights", "--json")
    assert done.code == 3
    assert done.json["first_difference"]["file"] == name
    assert done.json["levels"]["weights"]["ok"] is True


def test_a_missing_tensor(converted: Path, gptj):
    _rewrite(converted, lambda t: t.pop("gptj_decoder/1/ln_1/ln_1/beta"))
    first = _first(gptj("verify", "--against", "hf", "--json"), "structure")
    assert "gptj_decoder/1/ln_1/ln_1/beta" in first["found"]


def test_training_state_is_not_compared(converted: Path, gptj):
    def train(tensors) -> None:
        tensors["lm_head/lm_head/bias/AdamW"] = tensors["lm_head/lm_head/bias"] * 0
        tensors["beta1_power"] = np.float32(0.9)

    _rewrite(converted, train)
    assert gptj("verify", "--against", "hf", "--level", "weights").code == 0


def test_a_source_that_is_gone_cannot_judge(converted: Path, hf: Path, gptj):
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


@pytest.mark.parametrize("tolerance", ["0", "-1", "nonsense"])
def test_a_tolerance_that_is_none(tolerance: str, converted: Path, gptj):
    assert gptj("verify", "--tolerance", tolerance).code == 2
