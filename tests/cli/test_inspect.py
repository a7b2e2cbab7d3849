"""`gptj inspect`: what it lists, measures, checks and compares."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from gptj_convert.formats.containers.tensor_bundle import BundleSource, write_bundle
from gptj_convert.formats.layouts.tf import state_text
from gptj_convert.inspection.inspect import Statistics
from gptj_model.config import GPTJConfig
from gptj_model.source import read_tensor
from gptj_model.tensors import Scheme, table
from tests.conftest import GOLDEN_RUNS, SMALL, load_tensors, make_checkpoint, save_tensors

CONFIG = GPTJConfig.preset("tiny", **SMALL)
TENSORS = len(table(CONFIG))
DATA = "tf_model.ckpt.data-00000-of-00001"
Q = "transformer.h.1.attn.q_proj.weight"


def strict(text: str) -> dict[str, Any]:
    """Parse one JSON object, refusing the NaN and Infinity that Python's reader accepts."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in JSON")

    return json.loads(text, parse_constant=refuse)


def change(folder: Path, name: str, value: Any, *index: int) -> None:
    """Change a tensor of ./FOLDER/model.safetensors, or one value of it."""
    tensors = load_tensors(folder / "model.safetensors")
    tensors[name] = np.array(tensors[name])
    tensors[name][index or ...] = value
    save_tensors(folder / "model.safetensors", tensors)


def rewrite(folder: Path, edit) -> None:
    """Change the tensors of a converted folder's bundle, checksums following."""
    source = BundleSource(folder / "tf_model.ckpt")
    tensors = {name: read_tensor(source, name) for name in source.tensors}
    source.close()
    for path in folder.glob("tf_model.ckpt.*"):
        path.unlink()
    edit(tensors)
    write_bundle(folder / "tf_model.ckpt", tensors)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


# Listing.


@pytest.fixture
def anywhere(request: pytest.FixtureRequest, converted: Path, hf: Path) -> tuple[Path, Scheme]:
    """One checkpoint in each of the forms that are read."""
    state = load_file(hf / "model.safetensors")
    torch.save(state, "weights.bin")
    shutil.copy(hf / "config.json", "config.json")
    run = Path("run")
    run.mkdir()
    for path in converted.glob("tf_model.ckpt.*"):
        shutil.copy(path, run / path.name.replace("tf_model.ckpt", "model.ckpt-7"))
    shutil.copy(converted / "params.yaml", run)
    (run / "checkpoint").write_text(state_text(["model.ckpt-7"]))
    return {
        "folder": (hf, Scheme.HF),
        "safetensors": (hf / "model.safetensors", Scheme.HF),
        "bin": (Path("weights.bin"), Scheme.HF),
        "converted": (converted, Scheme.TF),
        "prefix": (converted / "tf_model.ckpt", Scheme.TF),
        "model_dir": (run, Scheme.TF),
    }[request.param]


@pytest.mark.parametrize(
    "anywhere",
    ["folder", "safetensors", "bin", "converted", "prefix", "model_dir"],
    indirect=True,
)
def test_every_form_lists_the_table(anywhere: tuple[Path, Scheme], gptj):
    path, scheme = anywhere
    found = strict(gptj("inspect", path, "--json").stdout)
    assert found["ok"] is True
    assert (found["path"], found["format"], found["problems"]) == (str(path), scheme.value, [])
    assert found["config"]["n_layer"] == 3
    weights = [t for t in found["tensors"] if t["role"] == "weight"]
    assert weights == [
        {
            "name": t.name(scheme),
            "hf": t.hf,
            "tf": t.tf,
            "cs": list(t.cs),
            "shape": list(t.shape_in(scheme)),
            "dtype": "float32",
            "bytes": 4 * t.size,
            "block": t.block,
            "role": "weight",
            "problem": None,
        }
        for t in table(CONFIG)
    ]
    assert found["totals"]["parameters"] == sum(t.size for t in table(CONFIG))
    others = [t["name"] for t in found["tensors"] if t["role"] != "weight"]
    assert others == (["global_step"] if scheme is Scheme.TF else [])


def test_a_pipe_gets_one_line_a_tensor(converted: Path, gptj):
    done = gptj("inspect", converted)
    assert done.code == 0
    assert done.stderr == ""
    (line,) = [
        li for li in done.stdout.splitlines() if "2/mlp/dense_layer_5/" in li and "ker" in li
    ]
    assert line.split() == [
        "gptj_decoder/2/mlp/dense_layer_5/dense_layer_5/kernel",
        *("[192,", "48]", "float32", "36.9", "kB", "2", "transformer.h.2.mlp.fc_out.weight"),
    ]
    assert "tf: 36 tensors (35 float32, 1 int64)" in done.stdout
    assert "config: 3 layers, hidden 48, 4 heads, vocabulary 211, head not tied" in done.stdout


def write_sparse_6b(folder: Path) -> None:
    """The 6B's header, and its 12 GB of data as a hole: none of it may be read in a test."""
    folder.mkdir()
    header, end = {}, 0
    for t in table(GPTJConfig()):
        offsets = [end, end := end + 2 * t.size]
        header[t.hf] = {"dtype": "F16", "shape": t.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(GPTJConfig().to_hf(dtype="float16")))


def test_the_6b_is_listed_from_its_header_in_a_terminals_width(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, gptj
):
    write_sparse_6b(workdir / "6b")
    monkeypatch.setenv("COLUMNS", "100")
    done = gptj("inspect", "6b")
    assert "hf: 285 tensors (285 float16), 6,050,882,784 parameters, 12.1 GB" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "\n    gptj_decoder/27/mlp/dense_layer_55/dense_layer_55/kernel\n" in done.stdout
    assert strict(gptj("inspect", "6b", "--json").stdout)["seconds"] < 5


def test_a_trained_checkpoints_state_is_no_weight(gptj, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    prefix = GOLDEN_RUNS / "adamw/ckpt/model.ckpt-20"
    config = GOLDEN_RUNS / "adamw/hf/config.json"
    done = gptj("inspect", prefix, "--config", config)
    assert "training state (73):" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    roles = {t["name"]: t["role"] for t in gptj("inspect", prefix, "--json").json["tensors"]}
    assert roles["lm_head/lm_head/bias/AdamW_1"] == roles["global_step"] == "training state"
    assert list(roles.values()).count("weight") == TENSORS


def test_problems_are_listed_without_an_error(hf: Path, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    del tensors["transformer.h.1.ln_1.bias"]
    tensors["transformer.h.0.mlp.fc_in.weight"] = tensors["transformer.h.0.mlp.fc_in.weight"].T
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].astype(np.int32)
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8), bool)
    tensors["mystery"] = np.zeros((2, 3, 4), np.float16)
    save_tensors(hf / "model.safetensors", tensors)
    done = gptj("inspect", hf)
    assert done.code == 0
    for line in (
        "problem: 'transformer.h.1.ln_1.bias' is missing, expected shape [48]",
        "problem: 'transformer.h.0.mlp.fc_in.weight' has shape [48, 192], expected [192, 48]",
        "problem: 'transformer.ln_f.bias' holds int32, expected one of float64",
        "problem: 'mystery' is not a tensor of this model",
        "ignored buffer (1):",
        "unknown (1):",
    ):
        assert line in done.stdout
    marked = [li.split()[0] for li in done.stdout.splitlines() if li.endswith("PROBLEM")]
    assert marked == [
        "transformer.h.0.mlp.fc_in.weight", "transformer.h.1.ln_1.bias", "transformer.ln_f.bias",
    ]  # fmt: skip
    found = gptj("inspect", hf, "--json").json
    assert (found["ok"], len(found["problems"])) == (True, 4)
    by_name = {t["name"]: t for t in found["tensors"]}
    assert by_name["transformer.h.1.ln_1.bias"]["shape"] is None
    assert by_name["transformer.h.1.ln_1.bias"]["role"] == "weight"
    assert by_name["transformer.h.0.attn.bias"]["role"] == "ignored buffer"
    assert by_name["mystery"]["role"] == "unknown"


def test_a_model_without_its_head(hf: Path, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    headless = {k.removeprefix("transformer."): v for k, v in tensors.items() if "lm_head" not in k}
    headless["h.0.attn.masked_bias"] = np.float32(-1e9)
    save_tensors(hf / "model.safetensors", headless)
    done = gptj("inspect", hf)
    assert done.code == 0
    assert "GPTJModel without a head" in done.stderr
    found = gptj("inspect", hf, "--json").json
    assert found["problems"] == [
        "'lm_head.weight' is missing, expected shape [211, 48]",
        "'lm_head.bias' is missing, expected shape [211]",
    ]
    assert found["tensors"][1]["name"] == "h.0.ln_1.weight"
    assert found["tensors"][1]["hf"] == "transformer.h.0.ln_1.weight"
    assert found["tensors"][-1]["role"] == "ignored buffer"


def test_a_tied_head_that_is_stored_again(workdir: Path, gptj):
    folder = make_checkpoint(workdir / "hf", tie_word_embeddings=True)
    tensors = load_tensors(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    save_tensors(folder / "model.safetensors", tensors)
    found = gptj("inspect", folder, "--json").json
    assert found["problems"] == []
    assert [t["role"] for t in found["tensors"] if t["name"] == "lm_head.weight"] == ["copy"]
    assert "head tied to the embedding" in gptj("inspect", folder).stdout


@pytest.mark.parametrize("which", ["hf", "converted"])
def test_without_a_config_names_are_listed_unmatched(which: str, converted: Path, gptj):
    for name in ("config.json", "params.yaml"):
        (Path(which) / name).unlink(missing_ok=True)
    Path(which).rename("bare")
    done = gptj("inspect", "bare")
    assert done.code == 0
    assert "problem: names cannot be matched: " in done.stdout
    assert "--config FILE" in done.stderr
    assert f"unmatched ({TENSORS}):" in done.stdout
    found = gptj("inspect", "bare", "--json").json
    assert found["config"] is None
    assert {t["hf"] for t in found["tensors"]} == {None}
    assert found["totals"]["parameters"] == sum(t.size for t in table(CONFIG))
    config = Path("kept.json")
    config.write_text(json.dumps(CONFIG.to_hf(dtype="float32")))
    assert gptj("inspect", "bare", "--config", config, "--json").json["problems"] == []
    assert gptj("inspect", "bare", "--config", "nowhere.json").code == 2


def test_a_config_of_another_model_is_reported(hf: Path, gptj):
    (hf / "config.json").write_text('{"model_type": "gpt2"}')
    done = gptj("inspect", hf)
    assert done.code == 0
    assert "model_type is 'gpt2'" in done.stdout


def test_hostile_names_do_not_reach_the_terminal(hf: Path, gptj):
    evil = "evil\n\x1b[31mMATCH\u202e"
    tensors = load_tensors(hf / "model.safetensors")
    save_tensors(hf / "model.safetensors", tensors | {evil: np.zeros(1), "x" * 9000: np.zeros(1)})
    shutil.copytree(hf, "copy")
    change(Path("copy"), evil, 1.0)
    for options in ((), ("--stats",), ("--diff", "copy")):
        done = gptj("inspect", hf, *options)
        assert not {"\x1b", "\u202e"} & set(done.stdout + done.stderr)
        assert not any(li.startswith("\x1b") or "x" * 401 in li for li in done.stdout.splitlines())
        assert "evil\\x0a\\x1b[31mMATCH\\x202e" in done.stdout
    assert evil in [t["name"] for t in gptj("inspect", hf, "--json").json["tensors"]]


@pytest.mark.parametrize("what", ["nowhere", "empty", "text.txt"])
@pytest.mark.parametrize("option", [(), ("--check",), ("--stats",)])
def test_no_checkpoint_there(what: str, option: tuple[str, ...], workdir: Path, gptj):
    (workdir / "empty").mkdir()
    (workdir / "text.txt").write_text("hello")
    done = gptj("inspect", what, *option)
    assert done.code == 1
    assert done.stderr.startswith("error: ")


# Figures.


def figures(values: np.ndarray) -> dict[str, float | int | None]:
    """Return numpy's figures of the whole tensor."""
    x = values.astype(np.float64).reshape(-1)
    finite = x[np.isfinite(x)]
    some = finite.size > 0
    return {
        "min": finite.min() if some else None,
        "max": finite.max() if some else None,
        "mean": finite.mean() if some else None,
        "std": finite.std() if some else None,
        "nan": int(np.isnan(x).sum()),
        "infinite": int(np.isinf(x).sum()),
        "zero": int((x == 0).sum()),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["hf", "tf"])
def test_figures_are_those_of_the_whole_tensor(
    dtype: str, target: str, workdir: Path, small_pieces: None, gptj
):
    folder = make_checkpoint(workdir / "hf", dtype=dtype, vocab_size=9000)
    change(folder, Q, 0.0, 3)
    source = load_tensors(folder / "model.safetensors")
    if target == "tf":
        assert gptj("convert", folder, "--to", "tf", "--dtype", "keep").code == 0
        folder = Path("converted")
    found = strict(gptj("inspect", folder, "--stats", "--json").stdout)["tensors"]
    for t in found:
        if t["hf"]:
            assert t["stats"] == pytest.approx(figures(source[t["hf"]]), rel=1e-12, abs=1e-15)
            assert t["dtype"] == dtype
    assert next(t for t in found if t["hf"] == Q)["stats"]["zero"] == 48


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int64, np.bool_]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
    ),
    st.integers(1, 50),
)
def test_figures_do_not_depend_on_the_pieces(values: np.ndarray, step: int):
    whole, pieces = Statistics(), Statistics()
    whole.add(values)
    flat = values.reshape(-1)
    for start in range(0, flat.size, step):
        pieces.add(flat[start : start + step])
    expected = figures(values)
    scale = abs(expected["max"] or 0) + abs(expected["min"] or 0)
    for found in (whole, pieces):
        for key, value in found.to_json().items():
            near = value is not None and pytest.approx(value, rel=1e-9, abs=1e-9 * scale)
            assert expected[key] == value or expected[key] == near, key


def test_values_that_are_not_finite_are_counted_and_never_printed_as_json(hf: Path, gptj):
    change(hf, "transformer.h.1.ln_1.bias", np.nan, 3)
    change(hf, "transformer.h.1.ln_1.bias", -np.inf, 4)
    change(hf, "transformer.h.2.ln_1.bias", np.nan)
    change(hf, "transformer.h.2.ln_1.weight", 3.4e38)
    done = strict(gptj("inspect", hf, "--stats", "--json").stdout)
    stats = {t["name"]: t["stats"] for t in done["tensors"]}
    assert stats["transformer.h.1.ln_1.bias"] == pytest.approx(
        figures(load_tensors(hf / "model.safetensors")["transformer.h.1.ln_1.bias"])
    )
    nothing = {"min": None, "max": None, "mean": None, "std": None, "infinite": 0, "zero": 0}
    assert stats["transformer.h.2.ln_1.bias"] == nothing | {"nan": 48}
    assert stats["transformer.h.2.ln_1.weight"]["std"] == 0
    shown = gptj("inspect", hf, "--stats").stdout
    assert "min none" in shown
    assert "NaN 48" in shown


def test_a_std_beyond_float64_is_none(workdir: Path, gptj):
    folder = make_checkpoint(workdir / "hf")
    tensors = load_tensors(folder / "model.safetensors")
    tensors["lm_head.bias"] = np.linspace(-1, 1, 211) * 1.7e308
    save_tensors(folder / "model.safetensors", tensors)
    found = strict(gptj("inspect", folder, "--stats", "--json").stdout)["tensors"][-1]["stats"]
    assert (found["max"], found["std"]) == (1.7e308, None)


# Checking.


def checked(done) -> list[tuple[str, str]]:
    """Kind and name of what a check found, as its exit code has it."""
    found = strict(done.stdout)
    problems = [(p["kind"], p["name"]) for p in found["check"]["problems"]]
    assert (done.code, found["ok"]) == ((3, False) if problems else (0, True))
    return problems


def test_a_whole_conversion_checks(converted: Path, small_pieces: None, gptj):
    (converted / "mine.txt").write_text("a note")
    done = gptj("inspect", converted, "--check", "--json")
    assert checked(done) == []
    assert done.json["check"]["extra"] == ["mine.txt"]
    assert done.json["check"]["checked"]["manifest.json"]["tensors"] == TENSORS
    assert done.json["check"]["checked"]["the bundle's index"]["tensors"] == TENSORS + 1
    shown = gptj("inspect", converted, "--check")
    assert shown.stdout.splitlines()[-1] == "WHOLE"
    assert "note: mine.txt" in shown.stdout


def test_params_yaml_may_be_edited(converted: Path, gptj):
    with (converted / "params.yaml").open("a") as f:
        f.write("# mine\n")
    assert checked(gptj("inspect", converted, "--check", "--json")) == []


@pytest.mark.parametrize("which", ["converted", "converted/tf_model.ckpt"])
def test_one_bit_of_the_data(which: str, converted: Path, gptj):
    source = BundleSource(converted / "tf_model.ckpt")
    name = "gptj_decoder/1/attn/k_proj/k_proj/kernel"
    flip(converted / DATA, source.entries[name].offset + 5)
    source.close()
    assert checked(gptj("inspect", which, "--check", "--json")) == [
        ("file", DATA), ("tensor", name), ("tensor", name),
    ]  # fmt: skip
    shown = gptj("inspect", which, "--check")
    assert f"DIFFERS: tensor {name}" in shown.stdout
    assert shown.stdout.splitlines()[-1] == "DAMAGED: 3 problems"


@pytest.mark.parametrize("at", [0, 30])
def test_one_bit_of_the_config(at: int, converted: Path, gptj):
    flip(converted / "config.json", at)
    assert checked(gptj("inspect", converted, "--check", "--json")) == [("file", "config.json")]


def test_one_bit_of_the_index(converted: Path, gptj):
    flip(converted / "tf_model.ckpt.index", 100)
    done = gptj("inspect", converted, "--check", "--json")
    assert checked(done) == [("file", "converted"), ("file", "tf_model.ckpt.index")]
    assert "checksum" in done.json["check"]["problems"][0]["found"]


@pytest.mark.parametrize("name", [DATA, "tf_model.ckpt.index", "config.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "folder", "pipe"])
def test_missing_files(name: str, damage: str, converted: Path, gptj):
    path = converted / name
    raw = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(raw[:-1])
    elif damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    assert ("file", name) in checked(gptj("inspect", converted, "--check", "--json"))


def edit_manifest(folder: Path, edit) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_manifest_that_says_otherwise(converted: Path, gptj):
    def edit(manifest) -> None:
        manifest["files"]["config.json"]["sha256"] = "0" * 64
        manifest["files"]["vocab.json"] = {"bytes": 7, "sha256": "1" * 64}
        manifest["tensors"][Q]["crc32c"] = "01234567"
        manifest["tensors"]["transformer.h.9.ln_1.bias"] = {"crc32c": "89abcdef"}

    edit_manifest(converted, edit)
    done = gptj("inspect", converted, "--check", "--json")
    tf = "gptj_decoder/1/attn/q_proj/q_proj/kernel"
    assert set(checked(done)) == {
        ("file", "config.json"), ("file", "vocab.json"),
        ("tensor", tf), ("tensor", "transformer.h.9.ln_1.bias"),
    }  # fmt: skip
    (problem,) = [p for p in done.json["check"]["problems"] if p["name"] == tf]
    assert problem["expected"] == "crc32c 01234567"
    assert problem["stated_by"] == "manifest.json"


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["files"].update({"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"a\0b": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"\ud800": {"bytes": 1, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"config.json": {"bytes": "1", "sha256": "0" * 64}}),
        lambda m: m["files"].update({"config.json": {}}),
        lambda m: m.update(files=[1]),
        lambda m: m.update(source=None),
        lambda m: m["tensors"][Q].update(crc32c="xyz"),
        lambda m: m.update(nonsense=1),
    ],
)
def test_a_manifest_that_is_none(edit, converted: Path, gptj):
    edit_manifest(converted, edit)
    assert checked(gptj("inspect", converted, "--check", "--json")) == [("file", "manifest.json")]
    assert gptj("verify", "--against", "hf", "--level", "weights").code == 3


def test_a_manifest_of_another_checkpoint_in_the_folder(converted: Path, hf: Path, gptj):
    shutil.copy(hf / "model.safetensors", converted / "other.safetensors")
    done = gptj("inspect", converted / "other.safetensors", "--check")
    assert done.code == 2
    assert "manifest.json" in done.stderr
    assert ".gptj-download.json" in done.stderr


def test_the_way_back_checks_too(converted: Path, gptj):
    assert gptj("convert", converted, "--to", "hf").code == 0
    assert checked(gptj("inspect", "converted-hf", "--check", "--json")) == []
    path = Path("converted-hf/model.safetensors")
    flip(path, path.stat().st_size - 1)
    Path("converted-hf/config.json").unlink()
    assert checked(gptj("inspect", "converted-hf", "--check", "--json")) == [
        ("file", "config.json"), ("file", "model.safetensors"), ("tensor", "lm_head.bias"),
    ]  # fmt: skip


def test_a_bundle_of_a_run_has_its_index_alone(workdir: Path, gptj):
    for path in (GOLDEN_RUNS / "adamw/ckpt").glob("model.ckpt-20.*"):
        shutil.copy(path, workdir)
    done = gptj("inspect", "model.ckpt-20", "--check", "--json")
    assert checked(done) == []
    assert done.json["check"]["checked"] == {"the bundle's index": {"files": 0, "tensors": 108}}
    flip(workdir / "model.ckpt-20.data-00000-of-00001", 1000)
    assert [kind for kind, _ in checked(gptj("inspect", "model.ckpt-20", "--check", "--json"))] == [
        "tensor"
    ]


def test_a_bin_has_the_crcs_of_its_archive(hf: Path, gptj):
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    assert checked(gptj("inspect", hf, "--check", "--json")) == []
    raw = (hf / "pytorch_model.bin").read_bytes()
    weights = load_tensors_of_bin(hf)
    flip(hf / "pytorch_model.bin", raw.index(weights[Q].tobytes()))
    done = gptj("inspect", hf, "--check", "--json")
    assert checked(done) == [("tensor", "pytorch_model.bin")]
    assert repr(Q) in done.json["check"]["problems"][0]["found"]


def load_tensors_of_bin(folder: Path) -> dict[str, np.ndarray]:
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return {name: t.numpy() for name, t in state.items()}


def test_a_bin_without_crcs_has_nothing_to_check(hf: Path, gptj):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    (hf / "model.safetensors").unlink()
    assert gptj("inspect", hf, "--check").code == 2


def test_a_folder_without_any_statement(hf: Path, gptj):
    done = gptj("inspect", hf, "--check", "--json")
    assert done.code == 2
    assert done.json["error"]["kind"] == "usage"


OUTSIDE = {"../x": {"size": 1, "digest": "sha256:" + "0" * 64}}
RECORD = {"repository": "a/b", "revision": None, "commit": "0" * 40, "files": OUTSIDE}


@pytest.mark.parametrize("record", ["{}", "no JSON", json.dumps(RECORD), "[" * 100_000])
def test_a_download_record_that_is_none(record: str, hf: Path, gptj):
    (hf / ".gptj-download.json").write_text(record)
    assert checked(gptj("inspect", hf, "--check", "--json")) == [("file", ".gptj-download.json")]


# Comparing.


def compared(done) -> tuple[str, dict[str, dict[str, Any]]]:
    """The outcome, as the exit code has it, and every tensor that is not identical by name."""
    found = strict(done.stdout)
    outcome = found["differences"]["outcome"]
    assert (done.code, found["ok"]) == ((3, False) if outcome == "different" else (0, True))
    return outcome, {t["name"]: t for t in found["differences"]["tensors"]}


@pytest.mark.parametrize("pair", [("hf", "converted"), ("converted", "hf"), ("hf", "hf")])
def test_a_conversion_is_identical(pair, converted: Path, small_pieces: None, gptj):
    done = gptj("inspect", pair[0], "--diff", pair[1], "--json")
    assert compared(done) == ("identical", {})
    assert done.json["differences"]["counts"]["identical"] == TENSORS
    assert gptj("inspect", pair[0], "--diff", pair[1]).stdout.splitlines()[-1] == "IDENTICAL"


@pytest.mark.parametrize("sides", ["hf-tf", "tf-hf", "tf-tf", "hf-hf"])
@pytest.mark.parametrize("small", [False, True])
def test_planted_values_are_found(sides: str, small: bool, converted: Path, request, gptj):
    if small:
        request.getfixturevalue("small_pieces")
    name = "transformer.h.2.mlp.fc_out.weight"
    shutil.copytree("hf", "changed-hf")
    before = load_tensors(Path("hf/model.safetensors"))[name]
    change(Path("changed-hf"), name, before[30, 100] + 0.5, 30, 100)
    change(Path("changed-hf"), name, before[47, 191] - 0.25, 47, 191)
    after = load_tensors(Path("changed-hf/model.safetensors"))[name]
    assert gptj("convert", "changed-hf", "--to", "tf", "--out", "changed-tf").code == 0
    left, right = sides.split("-")
    original = "converted" if right == "tf" else "hf"
    outcome, found = compared(gptj("inspect", f"changed-{left}", "--diff", original, "--json"))
    assert outcome == "different"
    assert list(found) == [name]
    assert found[name] == {
        "name": name,
        "outcome": "different",
        "dtypes": ["float32", "float32"],
        "shapes": [[48, 192], [48, 192]],
        "values": 48 * 192,
        "differing": 2,
        "nonfinite": 0,
        "max_abs": pytest.approx(0.5, rel=1e-6),
        "relative": pytest.approx(0.5 / before.astype(float).std(), rel=1e-6),
        "first": [30, 100],
        "first_values": [float(after[30, 100]), float(before[30, 100])],
        "rounded": None,
    }
    shown = gptj("inspect", f"changed-{left}", "--diff", original).stdout
    assert f"{name}: 2 of 9216 values differ, by up to 0.5 (" in shown
    assert "first at [30, 100]: " in shown
    assert shown.splitlines()[-1] == "DIFFERENT"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_no_difference(dtype: str, converted: Path, small_pieces: None, gptj):
    assert gptj("convert", "hf", "--to", "tf", "--dtype", dtype, "--out", "narrow").code == 0
    outcome, found = compared(gptj("inspect", "narrow", "--diff", "hf", "--json"))
    assert outcome == "rounded"
    assert {t["rounded"] for t in found.values() if t["outcome"] == "rounded"} == {"path"}
    assert found[Q]["max_abs"] > 0
    _, found = compared(gptj("inspect", "hf", "--diff", "narrow", "--json"))
    assert found[Q]["rounded"] == "other"
    shown = gptj("inspect", "hf", "--diff", "narrow").stdout
    assert f"{dtype} in OTHER, rounded from the other's float32" in shown
    # One value that is off by one unit of the narrow dtype is no rounding.
    values = load_tensors(Path("hf/model.safetensors"))[Q]
    change(Path("hf"), Q, values[5, 6] * 1.02, 5, 6)
    outcome, found = compared(gptj("inspect", "narrow", "--diff", "hf", "--json"))
    assert outcome == "different"
    assert [n for n, t in found.items() if t["outcome"] == "different"] == [Q]


def test_of_two_narrow_dtypes_either_may_be_the_rounding(workdir: Path, gptj):
    make_checkpoint(workdir / "hf", dtype="float16")
    assert gptj("convert", "hf", "--to", "tf", "--dtype", "bfloat16").code == 0
    outcome, found = compared(gptj("inspect", "hf", "--diff", "converted", "--json"))
    assert (outcome, found[Q]["rounded"]) == ("rounded", "other")
    assert found[Q]["dtypes"] == ["float16", "bfloat16"]


def test_a_wider_dtype_holds_equal_values(workdir: Path, gptj):
    make_checkpoint(workdir / "hf", dtype="bfloat16")
    assert gptj("convert", "hf", "--to", "tf").code == 0
    outcome, found = compared(gptj("inspect", "hf", "--diff", "converted", "--json"))
    assert outcome == "equal"
    assert found[Q]["dtypes"] == ["bfloat16", "float32"]
    assert found[Q]["first"] is None
    assert gptj("inspect", "hf", "--diff", "converted").stdout.splitlines()[-1] == "EQUAL"


def test_nan_is_equal_to_nan_and_zero_to_minus_zero(hf: Path, gptj):
    change(hf, Q, np.nan, 3, 4)
    change(hf, "lm_head.bias", 0.0, 7)
    shutil.copytree(hf, "copy")
    assert compared(gptj("inspect", hf, "--diff", "copy", "--json"))[0] == "identical"
    change(Path("copy"), Q, -np.float32(np.nan), 3, 4)
    change(Path("copy"), "lm_head.bias", -0.0, 7)
    outcome, found = compared(gptj("inspect", hf, "--diff", "copy", "--json"))
    assert (outcome, set(found)) == ("equal", {Q, "lm_head.bias"})
    change(Path("copy"), Q, np.inf, 3, 4)
    change(Path("copy"), Q, 1.0, 9, 9)
    outcome, found = compared(gptj("inspect", hf, "--diff", "copy", "--json"))
    assert outcome == "different"
    assert found[Q]["first_values"] == ["nan", "inf"]
    assert (found[Q]["differing"], found[Q]["nonfinite"]) == (2, 1)
    assert math.isfinite(found[Q]["max_abs"])
    assert (
        "first at [3, 4]: nan in PATH, inf in OTHER" in gptj("inspect", hf, "--diff", "copy").stdout
    )


def test_structure_and_config_count_as_differences(hf: Path, gptj):
    copy = shutil.copytree(hf, Path("copy"))
    tensors = load_tensors(hf / "model.safetensors")
    del tensors["transformer.h.1.ln_1.bias"]
    tensors["transformer.h.0.mlp.fc_in.weight"] = tensors["transformer.h.0.mlp.fc_in.weight"].T
    tensors["mine"] = np.zeros(2, np.float32)
    tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8), bool)
    save_tensors(hf / "model.safetensors", tensors)
    done = gptj("inspect", hf, "--diff", copy, "--json")
    outcome, found = compared(done)
    assert outcome == "different"
    assert found["transformer.h.1.ln_1.bias"]["dtypes"] == [None, "float32"]
    assert found["mine"]["dtypes"] == ["float32", None]
    assert found["transformer.h.0.mlp.fc_in.weight"]["shapes"] == [[48, 192], [192, 48]]
    assert len(found) == 3
    assert done.json["differences"]["not_compared"] == [{"ignored buffer": 1}, {}]
    shown = gptj("inspect", hf, "--diff", copy).stdout
    assert "transformer.h.1.ln_1.bias: not in PATH" in shown
    assert "mine: not in OTHER" in shown


@pytest.mark.parametrize(("field", "value", "code"), [("rotary_dim", 4, 3), ("bos_token_id", 1, 0)])
def test_a_config_that_computes_otherwise(field: str, value: int, code: int, hf: Path, gptj):
    copy = shutil.copytree(hf, Path("copy"))
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {field: value}))
    done = gptj("inspect", hf, "--diff", copy, "--json")
    assert done.code == code
    assert done.json["differences"]["config"] == {field: [values[field], value]}
    assert (
        f"config: {field} is {values[field]} in PATH, {value} in OTHER"
        in gptj("inspect", hf, "--diff", copy).stdout
    )


def test_optimizer_state_is_not_compared(converted: Path, gptj):
    shutil.copytree(converted, "trained")
    rewrite(
        Path("trained"),
        lambda t: t.update({"beta1_power": np.float32(0.9), "global_step": np.int64(7)}),
    )
    done = gptj("inspect", "trained", "--diff", converted, "--json")
    assert compared(done) == ("identical", {})
    assert done.json["differences"]["not_compared"] == [
        {"training state": 2}, {"training state": 1},
    ]  # fmt: skip


def test_a_tied_head_stored_again_is_read(workdir: Path, gptj):
    folder = make_checkpoint(workdir / "hf", tie_word_embeddings=True)
    copy = shutil.copytree(folder, workdir / "copy")
    tensors = load_tensors(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_tensors(copy / "model.safetensors", tensors)
    assert compared(gptj("inspect", folder, "--diff", copy, "--json"))[0] == "identical"
    change(copy, "lm_head.weight", 1.0, 3, 4)
    outcome, found = compared(gptj("inspect", folder, "--diff", copy, "--json"))
    assert outcome == "different"
    assert found["lm_head.weight"]["dtypes"] == [None, "float32"]


def test_a_side_without_a_config_asks_for_one(converted: Path, hf: Path, gptj):
    for name in ("config.json", "params.yaml"):
        (converted / name).unlink()
    for sides in ((hf, converted), (converted, hf)):
        done = gptj("inspect", sides[0], "--diff", sides[1])
        assert done.code == 2
        assert "--config FILE" in done.stderr
        config = ("--config", hf / "config.json")
        assert gptj("inspect", sides[0], "--diff", sides[1], *config).code == 0


def test_check_and_diff_at_once(converted: Path, hf: Path, gptj):
    flip(converted / "generation_config.json", 3)
    done = gptj("inspect", converted, "--check", "--diff", hf, "--json")
    assert done.code == 3
    assert done.json["differences"]["outcome"] == "identical"
    assert len(done.json["check"]["problems"]) == 1
    assert gptj("inspect", "nowhere", "--check", "--diff", hf).code == 1
    assert gptj("inspect", hf, "--diff", "nowhere").code == 1
