"""`gptj convert`: what comes out, read by other programs, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import torch
from safetensors.torch import load_file

from gptj_convert.checkpoint.open import open_checkpoint
from gptj_convert.conversion.execute import execute
from gptj_convert.conversion.plan import make_plan
from gptj_convert.files.ranged_file import ALIGNMENT
from gptj_convert.streams import writer
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.errors import TensorFault
from gptj_model.tensors import Scheme, table
from tests.conftest import GOLDEN_RUNS, load_tensors, make_checkpoint, save_tensors


def _same_bits(a: Path, b: Path) -> bool:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    return all(torch.equal(left[k].view(torch.uint8), right[k].view(torch.uint8)) for k in left)


def test_tensorflow_reads_the_result_under_the_references_names(converted: Path, hf: Path):
    config = GPTJConfig.from_file(hf / "config.json")
    source = load_tensors(hf / "model.safetensors")
    reader = tf.train.load_checkpoint(str(converted / "tf_model.ckpt"))
    assert set(reader.get_variable_to_shape_map()) == {t.tf for t in table(config)} | {
        "global_step"
    }
    assert reader.get_tensor("global_step") == 0
    assert reader.get_tensor("global_step").dtype == np.int64
    for t in table(config):
        found = reader.get_tensor(t.tf)
        expected = t.op(Scheme.HF, Scheme.TF)(source[t.hf])
        assert found.dtype == np.float32
        assert np.array_equal(found, expected), t.tf


def test_the_folder_is_complete(converted: Path):
    names = {p.name for p in converted.iterdir()}
    assert names >= {
        "tf_model.ckpt.index",
        "tf_model.ckpt.data-00000-of-00001",
        "config.json",
        "params.yaml",
        "manifest.json",
    }
    manifest = json.loads((converted / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"params.yaml", "manifest.json"}
    assert len(manifest["tensors"]) == len(table(GPTJConfig.from_file(converted / "config.json")))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_round_trip_is_bit_for_bit(
    dtype: str, tied: bool, workdir: Path, small_pieces: None, gptj
):
    make_checkpoint(workdir / "hf", dtype=dtype, tie_word_embeddings=tied)
    assert gptj("convert", "hf", "--to", "tf", "--dtype", "keep").code == 0
    assert gptj("convert", "converted", "--to", "hf").code == 0
    assert _same_bits(Path("hf/model.safetensors"), Path("converted-hf/model.safetensors"))
    before, after = (GPTJConfig.from_file(Path(d) / "config.json") for d in ("hf", "converted-hf"))
    assert before == after


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_are_rounded_as_numpy_rounds(dtype: str, hf: Path, small_pieces: None, gptj):
    assert gptj("convert", hf, "--to", "tf", "--dtype", dtype).code == 0
    source = load_tensors(hf / "model.safetensors")["transformer.wte.weight"]
    reader = tf.train.load_checkpoint("converted/tf_model.ckpt")
    found = reader.get_tensor("input_embedding/embedding_weights")
    assert found.dtype == NUMPY[dtype]
    assert found.tobytes() == source.astype(NUMPY[dtype]).tobytes()


def test_a_bin_with_old_buffers_converts_like_safetensors(hf: Path, converted: Path, gptj):
    state = load_file(hf / "model.safetensors")
    for i in range(3):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9)
    torch.save(state, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    assert gptj("convert", hf, "--to", "tf", "--out", "from-bin").code == 0
    name = "tf_model.ckpt.data-00000-of-00001"
    assert (Path("from-bin") / name).read_bytes() == (converted / name).read_bytes()


def test_a_tied_bin_that_repeats_the_embedding_converts(workdir: Path, gptj):
    make_checkpoint(workdir / "hf", tie_word_embeddings=True)
    state = load_file("hf/model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, "hf/pytorch_model.bin")
    Path("hf/model.safetensors").unlink()
    assert gptj("convert", "hf", "--to", "tf").code == 0

    state["lm_head.weight"] = state["transformer.wte.weight"] + 1
    torch.save(state, "hf/pytorch_model.bin")
    refused = gptj("convert", "hf", "--to", "tf", "--out", "other")
    assert refused.code == 1
    assert "'lm_head.weight' differs from 'transformer.wte.weight'" in refused.stderr


@pytest.mark.parametrize("case", ["adamw", "shared_embedding"])
def test_the_references_bundles_become_the_originals(case: str, workdir: Path, gptj):
    folder = GOLDEN_RUNS / case
    done = gptj("convert", folder / "tf_model.ckpt", "--to", "hf", "--out", "back")
    assert done.code == 0
    assert _same_bits(folder / "hf/model.safetensors", workdir / "back/model.safetensors")


def test_a_trained_checkpoint_leaves_its_slots_behind(workdir: Path, gptj):
    folder = GOLDEN_RUNS / "adamw"
    assert gptj("convert", folder / "ckpt/model.ckpt-20", "--to", "hf").code == 0
    found = load_tensors(workdir / "converted-hf/model.safetensors")
    reader = tf.train.load_checkpoint(str(folder / "ckpt/model.ckpt-20"))
    kernel = reader.get_tensor("gptj_decoder/1/attn/q_proj/q_proj/kernel")
    assert np.array_equal(found["transformer.h.1.attn.q_proj.weight"], kernel.T)


def test_the_same_source_gives_the_same_bytes(hf: Path, gptj):
    for out in ("a", "b"):
        assert gptj("convert", hf, "--to", "tf", "--out", out).code == 0
    for path in Path("a").iterdir():
        assert path.read_bytes() == (Path("b") / path.name).read_bytes(), path.name


def test_dry_run_writes_nothing(hf: Path, gptj):
    done = gptj("convert", hf, "--to", "tf", "--dry-run")
    assert done.code == 0
    assert "gptj_decoder/2/mlp/dense_layer_5/dense_layer_5/kernel  transpose" in done.stdout
    assert [p.name for p in Path.cwd().iterdir()] == ["hf"]


def test_the_same_format_in_another_dtype(converted: Path, hf: Path, gptj):
    assert gptj("convert", hf, "--to", "hf", "--dtype", "float16").code == 0
    expected = {k: v.half() for k, v in load_file(hf / "model.safetensors").items()}
    found = load_file("converted-hf/model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    assert gptj("convert", converted, "--to", "tf", "--dtype", "keep", "--out", "copy").code == 0
    for path in converted.glob("tf_model.ckpt.*"):
        assert path.read_bytes() == (Path("copy") / path.name).read_bytes()
    for out in ("converted-hf", "copy"):
        assert gptj("verify", out, "--level", "weights").code == 0


def test_a_bin_becomes_safetensors(hf: Path, gptj):
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").rename("model.safetensors")
    assert gptj("convert", hf, "--to", "hf").code == 0
    assert _same_bits(Path("model.safetensors"), Path("converted-hf/model.safetensors"))


def test_json_is_one_object(hf: Path, gptj):
    done = gptj("convert", hf, "--to", "tf", "--json")
    assert done.json["ok"] is True
    assert done.json["output"] == "converted"
    assert done.json["seconds"] > 0
    assert done.json["peak_rss_bytes"] > 2**20


# What is refused. Each leaves nothing behind that looks like an output.


def _refused(done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    lines = done.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1
    for word in words:
        assert word in done.stderr
    assert not Path("converted").exists()
    assert not list(Path.cwd().glob("*.partial-*"))


def test_another_model_type(hf: Path, gptj):
    config = json.loads((hf / "config.json").read_text()) | {"model_type": "gpt2"}
    (hf / "config.json").write_text(json.dumps(config))
    _refused(gptj("convert", hf, "--to", "tf"), 2, "model_type is 'gpt2'", "expected 'gptj'")


def test_no_config(hf: Path, gptj):
    (hf / "config.json").unlink()
    _refused(gptj("convert", hf, "--to", "tf"), 2, "config.json: not found", "hint:")


def test_a_bundle_without_config(converted: Path, gptj):
    (converted / "config.json").unlink()
    (converted / "params.yaml").unlink()
    converted.rename("bare")
    _refused(gptj("convert", "bare", "--to", "hf"), 2, "--config FILE")
    assert gptj("convert", "bare", "--to", "hf", "--config", "hf/config.json").code == 0


def test_params_yaml_stands_in_for_config_json(converted: Path, hf: Path, gptj):
    (converted / "config.json").unlink()
    assert gptj("convert", converted, "--to", "hf").code == 0
    assert _same_bits(hf / "model.safetensors", Path("converted-hf/model.safetensors"))


def test_every_tensor_that_is_wrong_is_named(hf: Path, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    del tensors["transformer.h.1.ln_1.bias"]
    tensors["transformer.h.0.mlp.fc_in.weight"] = tensors["transformer.h.0.mlp.fc_in.weight"].T
    tensors["transformer.h.0.mlp.fc_in.qweight"] = np.zeros(3, np.float32)
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].astype(np.int32)
    save_tensors(hf / "model.safetensors", tensors)
    done = gptj("convert", hf, "--to", "tf")
    _refused(
        done,
        1,
        "4 problem(s)",
        "'transformer.h.1.ln_1.bias' is missing, expected shape [48]",
        "'transformer.h.0.mlp.fc_in.weight' has shape [48, 192], expected [192, 48]",
        "'transformer.h.0.mlp.fc_in.qweight' is not a tensor of this model",
        "'transformer.ln_f.bias' holds int32",
    )


def test_a_headless_model_is_never_given_a_head(hf: Path, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    headless = {k.removeprefix("transformer."): v for k, v in tensors.items() if "lm_head" not in k}
    save_tensors(hf / "model.safetensors", headless)
    _refused(gptj("convert", hf, "--to", "tf"), 1, "GPTJModel without a head")


def test_truncated_safetensors(hf: Path, gptj):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    _refused(gptj("convert", hf, "--to", "tf"), 1, "model.safetensors", "its header calls for")


def test_truncated_bin(hf: Path, gptj):
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    path = hf / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-100])
    _refused(gptj("convert", hf, "--to", "tf"), 1, "pytorch_model.bin")


class _Evil:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def test_a_bin_that_would_run_code(hf: Path, gptj):
    torch.save({"transformer.wte.weight": _Evil()}, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    _refused(gptj("convert", hf, "--to", "tf"), 1, "posix", "system")
    assert not Path("ran").exists()


def test_float16_that_would_overflow(hf: Path, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    tensors["transformer.h.2.attn.v_proj.weight"][3, 4] = 65520.0
    save_tensors(hf / "model.safetensors", tensors)
    done = gptj("convert", hf, "--to", "tf", "--dtype", "float16")
    _refused(done, 1, "'transformer.h.2.attn.v_proj.weight'", "65504")
    assert gptj("convert", hf, "--to", "tf", "--dtype", "bfloat16").code == 0


def test_values_that_are_too_large_saturate_if_asked(hf: Path, small_pieces: None, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    name = "transformer.h.2.attn.v_proj.weight"
    tensors[name][3, 4:8] = [65520.0, -1e30, np.inf, 65519.0]
    save_tensors(hf / "model.safetensors", tensors)
    done = gptj("convert", hf, "--to", "tf", "--dtype", "float16", "--saturate", "--json")
    assert done.code == 0
    kernel = "gptj_decoder/2/attn/v_proj/v_proj/kernel"
    assert done.json["saturated"] == {kernel: 2}
    assert done.json["nonfinite"] == {kernel: 1}
    found = tf.train.load_checkpoint("converted/tf_model.ckpt").get_tensor(kernel)
    assert found[4:8, 3].tolist() == [65504.0, -65504.0, np.inf, 65504.0]
    assert gptj("verify", "--level", "weights").code == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nan_and_infinity_are_kept_and_reported(
    dtype: str, workdir: Path, small_pieces: None, gptj
):
    make_checkpoint(workdir / "hf", dtype="float32")
    tensors = load_tensors(workdir / "hf/model.safetensors")
    tensors["transformer.wte.weight"][0, :3] = [np.nan, np.inf, -np.inf]
    save_tensors(workdir / "hf/model.safetensors", tensors)
    done = gptj("convert", "hf", "--to", "tf", "--dtype", dtype)
    assert done.code == 0
    assert "warning: 3 values of input_embedding/embedding_weights are NaN" in done.stderr
    found = tf.train.load_checkpoint("converted/tf_model.ckpt")
    values = found.get_tensor("input_embedding/embedding_weights")[0, :3].astype(np.float32)
    assert np.isnan(values[0])
    assert values[1:].tolist() == [np.inf, -np.inf]


def test_a_head_that_is_the_embedding_may_be_shared(hf: Path, small_pieces: None, gptj):
    tensors = load_tensors(hf / "model.safetensors")
    share = ("--to", "tf", "--share-embeddings")
    _refused(gptj("convert", hf, *share), 2, "differs from its embedding")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    save_tensors(hf / "model.safetensors", tensors)
    assert gptj("convert", hf, *share).code == 0
    variables = dict(tf.train.list_variables("converted/tf_model.ckpt"))
    assert variables["bias"] == [211]
    assert "lm_head/lm_head/kernel" not in variables
    assert gptj("verify").code == 0
    assert gptj("convert", "converted", *share, "--out", "again").code == 0
    assert gptj("convert", hf, "--to", "tf", "--out", "whole").code == 0
    assert gptj("convert", "whole", *share, "--out", "shared").code == 0
    data = "tf_model.ckpt.data-00000-of-00001"
    for other in ("again", "shared"):
        assert (Path(other) / data).read_bytes() == (Path("converted") / data).read_bytes()
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_tensors(hf / "model.safetensors", tensors)
    assert gptj("verify", "--level", "weights").code == 3


def test_an_existing_output_is_left_alone(converted: Path, hf: Path, gptj):
    stale = converted / "stale.json"
    stale.write_text("{}")
    done = gptj("convert", hf, "--to", "tf")
    assert done.code == 2
    assert "--force" in done.stderr
    assert stale.exists()
    assert gptj("convert", hf, "--to", "tf", "--force").code == 0
    assert not stale.exists()


def test_foreign_files_are_named_before_they_are_replaced(converted: Path, hf: Path, gptj):
    mine = converted / "notes" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    done = gptj("convert", hf, "--to", "tf")
    assert done.code == 2
    assert "holds notes/mine.txt, which this program did not write" in done.stderr
    assert "--force would delete the whole folder" in done.stderr
    assert mine.read_text() == "precious"


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("hf", "hf"),
        ("hf", "hf/"),
        ("hf", "./hf/../hf"),
        ("hf", "hf/new"),
        ("hf", "hf/not/yet/there"),
        ("hf", "link"),
        ("hf", "link/new"),
        ("link", "hf/new"),
        (".", "converted"),
        ("hf/model.safetensors", "hf"),
        ("link/model.safetensors", "hf"),
        ("hf/model.safetensors", "link"),
        ("hf", "."),
        ("links", "hf"),
        ("links/model.safetensors", "links"),
    ],
)
def test_an_output_that_is_not_apart_from_its_source(source: str, out: str, hf: Path, gptj):
    Path("link").symlink_to("hf")
    Path("links").mkdir()
    for path in hf.iterdir():
        (Path("links") / path.name).symlink_to(path)
    if source == ".":
        os.chdir(hf)
    before = sorted(Path.cwd().rglob("*"))
    for force in ((), ("--force",), ("--dry-run",)):
        done = gptj("convert", source, "--to", "hf", "--out", out, *force)
        assert done.code == 2, done.stderr
        assert f"error: {Path(out)}: " in done.stderr
        assert sorted(Path.cwd().rglob("*")) == before
    assert len(load_tensors(hf / "model.safetensors")) == 35
    words = ("is the source itself", "lies inside the source", "holds the source file")
    assert any(word in done.stderr for word in words)


def test_an_output_beside_its_source(converted: Path, hf: Path, gptj):
    """A name with the same prefix, or a folder beside a file, is no part of the source."""
    for source, out in (("hf", "hf-2"), ("converted/tf_model.ckpt", "converted/back")):
        assert gptj("convert", source, "--to", "hf", "--out", out).code == 0


TOKENIZER = "tokenizer.json"


@pytest.mark.parametrize(
    ("tokenizer", "last"),
    [
        ({"model": {"vocab": {"a": 0, "b": 211}}}, 211),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 50400, "content": "x"}]}, 50400),
        ({"model": {"vocab": [["a", 0.5]] * 300}}, 299),
    ],
)
def test_a_tokenizer_with_more_ids_than_rows(tokenizer: dict, last: int, hf: Path, gptj):
    (hf / TOKENIZER).write_text(json.dumps(tokenizer))
    done = gptj("convert", hf, "--to", "tf")
    assert done.code == 0
    assert (
        f"note: tokenizer.json has ids up to {last}, but the model has only 211 rows" in done.stderr
    )
    assert (Path("converted") / TOKENIZER).read_bytes() == (hf / TOKENIZER).read_bytes()


@pytest.mark.parametrize(
    "tokenizer",
    [{}, {"model": {"vocab": {"a": 210}}}, {"model": 3, "added_tokens": [{"id": None}, 4]}],
)
def test_a_tokenizer_that_fits_or_is_of_another_kind(tokenizer: dict, hf: Path, gptj):
    (hf / TOKENIZER).write_text(json.dumps(tokenizer))
    done = gptj("convert", hf, "--to", "tf")
    assert done.code == 0
    assert "note:" not in done.stderr


@pytest.mark.parametrize("name", [TOKENIZER, "vocab.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "holds a Git LFS pointer"),
        ('{"model": {"vocab": {"a": 0,', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("3", "holds a JSON int"),
        ("", "is empty"),
    ],
)
def test_a_file_beside_the_weights_that_is_none(text: str, words: str, name: str, hf: Path, gptj):
    (hf / name).write_text(text)
    for dry in ((), ("--dry-run",)):
        _refused(gptj("convert", hf, "--to", "tf", *dry), 1, f"{name}: {words}", "hint:")


@pytest.mark.parametrize("out", [".", "..", "hf/.."])
def test_the_current_folder_is_no_output(out: str, hf: Path, gptj):
    done = gptj("convert", hf, "--to", "tf", "--out", out)
    assert done.code == 2
    assert "error: " in done.stderr
    assert [p.name for p in Path.cwd().iterdir()] == ["hf"]


@pytest.mark.parametrize("source", ["nowhere", "empty", "text.txt"])
def test_no_checkpoint_there(source: str, workdir: Path, gptj):
    (workdir / "empty").mkdir()
    (workdir / "text.txt").write_text("hello")
    _refused(gptj("convert", source, "--to", "tf"), 1, source, "expected")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_known_before_the_first_byte(hf: Path, gptj):
    Path("disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "disk"], check=True)
    try:
        _refused(gptj("convert", hf, "--to", "tf", "--out", "disk/out"), 1, "GB needed")
        assert not list(Path("disk").iterdir())
    finally:
        subprocess.run(["umount", "disk"], check=True)


def test_a_disk_that_fills_midway(hf: Path):
    """A limit on file sizes gives the same kind of error, after the check of free space."""
    import resource

    done = subprocess.run(
        [sys.executable, "-m", "runner.cli.root", "convert", str(hf), "--to", "tf"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "tf_model.ckpt.data-00000-of-00001: cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in Path.cwd().iterdir()] == ["hf"]


def test_too_little_memory_is_refused_with_the_need(workdir: Path):
    import resource

    make_checkpoint(workdir / "hf", n_embd=2048, n_head=2, vocab_size=5000, n_layer=1)
    limit = 240 * 2**20

    def limited(size: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "runner.cli.root", "convert", "hf", "--to", "tf"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    refused = limited(limit)
    assert refused.returncode == 1
    assert "of memory needed" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [p.name for p in Path.cwd().iterdir()] == ["hf"]
    assert limited(limit + 2**30).returncode == 0


def test_a_source_that_changes_while_it_is_read(hf: Path, small_pieces: None, monkeypatch):
    monkeypatch.setattr(writer, "BLOCK_BYTES", ALIGNMENT)
    weights = hf / "model.safetensors"
    with open_checkpoint(hf) as checkpoint:
        events = execute(make_plan(checkpoint, Scheme.TF, "float32"), checkpoint, Path("converted"))
        next(events)
        os.utime(weights, ns=(1, 1))
        with pytest.raises(TensorFault, match="changed while they were read"):
            list(events)
    assert [p.name for p in Path.cwd().iterdir()] == ["hf"]
