"""Sharded Hugging Face checkpoints: read, written, and refused where index and shards disagree."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptj_convert.formats.containers.sharded import ShardedSource
from gptj_model.config import GPTJConfig
from gptj_model.errors import FileFault, TensorFault
from gptj_model.tensors import EMBEDDING, HEAD_WEIGHT, table
from tests.conftest import SMALL, make_checkpoint

INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
#: Between the size of a small checkpoint's largest tensor and that of the whole.
LIMIT = "80KB"

ROWS, WIDTH = SMALL["vocab_size"], SMALL["n_embd"]

on_one_path = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def saved_by_transformers(small_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that transformers itself divided."""
    folder = tmp_path_factory.mktemp("sharded") / "hf"
    model = AutoModelForCausalLM.from_pretrained(small_hf)
    model.save_pretrained(folder, max_shard_size=LIMIT)
    assert len(list(folder.glob("*.safetensors"))) == 6
    return folder


@pytest.fixture
def sharded(saved_by_transformers: Path, workdir: Path) -> Path:
    """A copy of six shards at ./sharded."""
    return shutil.copytree(saved_by_transformers, workdir / "sharded")


def _state(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a folder of safetensors with the library."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        assert not state.keys() & found.keys()
        state |= found
    return state


def _same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8))
        for k in a
    )


def _write_bin_shards(
    folder: Path, state: dict[str, torch.Tensor], count: int, metadata: dict[str, Any] | None
) -> None:
    """Write shards of pickled tensors, distributing the names in turn."""
    names = [f"pytorch_model-{n + 1:05d}-of-{count:05d}.bin" for n in range(count)]
    weight_map = {name: names[n % count] for n, name in enumerate(state)}
    for shard in names:
        torch.save({k: v for k, v in state.items() if weight_map[k] == shard}, folder / shard)
    index = {"weight_map": weight_map} | ({} if metadata is None else {"metadata": metadata})
    (folder / BIN_INDEX).write_text(json.dumps(index))


def _size(state: dict[str, torch.Tensor]) -> int:
    return sum(t.nbytes for t in state.values())


# Reading.


@pytest.mark.parametrize("source", ["sharded", f"sharded/{INDEX}"])
def test_what_transformers_divided_converts_like_one_file(
    source: str, sharded: Path, hf: Path, gptj
):
    assert gptj("convert", source, "--to", "tf").code == 0
    assert gptj("convert", hf, "--to", "tf", "--out", "whole").code == 0
    data = "tf_model.ckpt.data-00000-of-00001"
    assert Path("converted", data).read_bytes() == Path("whole", data).read_bytes()
    manifest = json.loads(Path("converted/manifest.json").read_text())
    expected = {INDEX, *(f"model-{n:05d}-of-00006.safetensors" for n in range(1, 7))}
    assert set(manifest["source"]["files"]) == expected
    assert gptj("verify", "--level", "weights").code == 0


@pytest.mark.parametrize("bytes_of_a_bool", [1, 1 / 8])
def test_bin_shards_with_old_buffers_and_mixed_dtypes(bytes_of_a_bool: float, hf: Path, gptj):
    state = load_file(hf / "model.safetensors")
    for n, name in enumerate(state):
        state[name] = state[name].to((torch.float32, torch.float16, torch.bfloat16)[n % 3])
    weights = dict(state)
    for i in range(3):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9)
    (hf / "model.safetensors").unlink()
    # Old transformers count an eighth of a byte for a bool, and so get a float.
    size = _size(state) - 3 * 64 + 3 * 64 * bytes_of_a_bool
    _write_bin_shards(hf, state, 4, {"total_size": size})
    assert gptj("convert", hf, "--to", "hf").code == 0
    assert _same_bits(_state(Path("converted-hf")), weights)
    assert gptj("verify", "converted-hf", "--level", "weights").code == 0


def test_the_order_of_preference_is_that_of_transformers(sharded: Path, hf: Path, gptj):
    """model.safetensors, its index, pytorch_model.bin, its index: the first is read."""
    state = load_file(hf / "model.safetensors")
    state = {k: v + 1 for k, v in state.items()}
    _write_bin_shards(sharded, state, 2, None)
    torch.save(state, sharded / "pytorch_model.bin")
    shutil.copy(hf / "model.safetensors", sharded)
    for name in ("model.safetensors", INDEX, "pytorch_model.bin", BIN_INDEX):
        assert gptj("convert", sharded, "--to", "tf", "--force").code == 0
        manifest = json.loads(Path("converted/manifest.json").read_text())
        assert min(manifest["source"]["files"], key=len) == name
        (sharded / name).unlink()


@pytest.mark.parametrize("counted", ["once", "twice", "not at all", "as a float"])
@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_may_be_counted_once_or_twice(stored: bool, counted: str, workdir: Path, gptj):
    folder = make_checkpoint(workdir / "hf", tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    embedding = state[EMBEDDING.hf]
    once = _size(state)
    if stored:
        state[HEAD_WEIGHT.hf] = embedding
    (folder / "model.safetensors").unlink()
    metadata = {
        "once": {"total_size": once},
        "twice": {"total_size": once + embedding.nbytes},
        "not at all": {},
        "as a float": {"total_size": float(once)},
    }[counted]
    _write_bin_shards(folder, state, 3, metadata)
    assert gptj("convert", folder, "--to", "tf").code == 0


def test_verify_names_a_damaged_shard(sharded: Path, gptj):
    assert gptj("convert", sharded, "--to", "hf", "--max-shard-size", LIMIT).code == 0
    shard = Path("converted-hf/model-00002-of-00006.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = gptj("verify", "converted-hf", "--level", "weights", "--json")
    assert done.code == 3
    named = done.json["first_difference"]["tensor"]["hf"]
    assert named == list(load_file(shard))[-1] or named in load_file(shard)
    shard.unlink()
    done = gptj("verify", "converted-hf", "--json")
    assert done.code == 3
    assert shard.name in done.json["first_difference"]["found"]


# What is refused: index and shards that disagree.


def _refused(done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "hint: " in done.stderr
    assert "a fault in gptj itself" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not Path("converted").exists()
    assert not list(Path.cwd().glob("*.partial-*"))


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def _edit_shard(folder: Path, n: int, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / f"model-{n:05d}-of-00006.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


_opened: list[str] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_listen)


HOSTILE = [
    "../outside.safetensors",
    "sub/../../outside.safetensors",
    "sub/inside.safetensors",
    "..",
    "../sharded/model-00002-of-00006.safetensors",
    "..\\outside.safetensors",
    "C:\\outside.safetensors",
    "nul\0.safetensors",
    "line\n.safetensors",
    "esc\x1b[2J.safetensors",
    "model-00001-of-00006.bin",
    "config.json",
    INDEX,
    "",
    ".safetensors",
    "*.safetensors",
    "é.safetensors",
    "\ud800.safetensors",
    "x" * 300 + ".safetensors",
    None,
    7,
    ["model-00002-of-00006.safetensors"],
    {"a": 1},
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_that_no_shard_has(name: Any, sharded: Path, gptj):
    """A readable shard lies wherever such a name points; none is opened."""
    global _opened
    shard = sharded / "model-00002-of-00006.safetensors"
    (sharded / "sub").mkdir()
    shutil.copy(shard, sharded / "sub/inside.safetensors")
    shutil.copy(shard, "outside.safetensors")
    absolute = name == "C:\\outside.safetensors"

    def rename(index: dict[str, Any]) -> None:
        for tensor, holder in index["weight_map"].items():
            if holder == shard.name:
                place = str(Path.cwd() / "outside.safetensors") if absolute else name
                index["weight_map"][tensor] = place

    _edit(sharded, rename)
    _opened = []
    try:
        done = gptj("convert", sharded, "--to", "tf")
        opened = _opened
    finally:
        _opened = None
    _refused(done, 1, "1 problem(s)", "is not the name of a shard", "ending in .safetensors")
    assert "\x1b" not in done.stderr
    assert any(path.endswith("model-00001-of-00006.safetensors") for path in opened)
    assert not any("side.safetensors" in path or shard.name in path for path in opened)


def test_every_problem_is_listed_at_once(sharded: Path, gptj):
    (sharded / "model-00006-of-00006.safetensors").unlink()
    (sharded / "model-00005-of-00006.safetensors").write_bytes(b"version https://git-lfs.github")
    first = list(load_file(sharded / "model-00001-of-00006.safetensors"))
    second = list(load_file(sharded / "model-00002-of-00006.safetensors"))
    third = list(load_file(sharded / "model-00003-of-00006.safetensors"))

    def change(index: dict[str, Any]) -> None:
        del index["weight_map"][first[0]]
        index["weight_map"][second[0]] = "model-00003-of-00006.safetensors"
        index["weight_map"]["lm_head.extra"] = "model-00004-of-00006.safetensors"
        index["weight_map"]["lm_head.other"] = "/etc/passwd"

    _edit(sharded, change)
    _edit_shard(sharded, 4, lambda state: state.update({third[0]: torch.zeros(3)}))
    four, five, six = (f"model-{n:05d}-of-00006.safetensors" for n in (4, 5, 6))
    words = (
        "7 problem(s)",
        f"shard {six} does not exist",
        f"{five}: holds a Git LFS pointer",
        "'/etc/passwd' is not the name of a shard",
        f"{first[0]!r} is in model-00001-of-00006.safetensors, but not in the index",
        f"{second[0]!r} is not in model-00003-of-00006.safetensors, as the index states, but in "
        "model-00002-of-00006.safetensors",
        f"'lm_head.extra' is not in {four}, as the index states\n",
        f"{third[0]!r} is in 2 shards, model-00003-of-00006.safetensors and {four}",
    )
    _refused(gptj("convert", sharded, "--to", "tf"), 1, *words)


@pytest.mark.parametrize(
    "change",
    [lambda n: n + 1, lambda n: n - 1, lambda n: n * 2, lambda n: n + 0.5, lambda n: -n,
     lambda n: 0, lambda n: str(n), lambda n: True, lambda n: [n], lambda n: 10**4000],
)  # fmt: skip
def test_a_wrong_total_size(change: Callable[[int], Any], sharded: Path, gptj):
    _edit(sharded, lambda i: i["metadata"].update(total_size=change(i["metadata"]["total_size"])))
    _converts_with_note(gptj("convert", sharded, "--to", "tf"), "metadata.total_size is")


@pytest.mark.parametrize("metadata", [None, 3, [], "x"])
def test_metadata_that_is_no_object(metadata: object, sharded: Path, gptj):
    _edit(sharded, lambda index: index.update(metadata=metadata))
    shown = "null" if metadata is None else repr(metadata)
    _converts_with_note(gptj("convert", sharded, "--to", "tf"), f"metadata is {shown}, expected")


def _converts_with_note(done, words: str) -> None:
    assert done.code == 0, done.stderr
    assert done.stderr.count("note: ") == 1
    assert f"sharded/{INDEX}: {words}" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty, expected an index of shards"),
        ("version https://git-lfs.github.com/spec/v1\n", "holds a Git LFS pointer"),
        ("<!doctype html><html>", "holds an HTML page"),
        ("{", "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        ("[" * 30_000, "is not valid JSON"),
        ("[" * 100_000, "more than"),
        ('{"metadata": {"total_size": NaN}, "weight_map": {"a": "b"}}', "NaN"),
        ('{"weight_map": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[1]", "holds a JSON list, expected an object"),
        ('"a"', "holds a JSON str, expected an object"),
        ("{}", "weight_map is None"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": [["a", "b"]]}', "weight_map is [["),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' occurs twice"),
        (json.dumps({"weight_map": {f"{n}": f"{n}.safetensors" for n in range(401)}}),
         "names 401 shards, expected at most 400"),
        (json.dumps({"weight_map": {f"{n}": "b.safetensors" for n in range(40_000)}}), "more than"),
        (" " * (4 * 2**20 + 1), "expected an index of shards of at most 4194304"),
    ],
)  # fmt: skip
def test_an_index_that_is_none(text: str, words: str, sharded: Path, gptj):
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    _refused(gptj("convert", sharded, "--to", "tf"), 1, INDEX, words)


def test_2000_mutated_indexes(sharded: Path):
    """Each index is refused with a fault, or describes every tensor as the whole one does."""
    path = sharded / INDEX
    whole = path.read_bytes()
    expected = ShardedSource(path)
    expected.close()
    values = [b'"', b"{", b"}", b"[1]", b"null", b",", b"1e999", b"-1", b"\\", b"\0", b"\xff", b"/"]
    generator = random.Random(5)
    accepted = longest = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            at, length = generator.randrange(len(data)), generator.choice((0, 1, 1, 5, 60))
            source = generator.randrange(len(data))
            data[at : at + length] = generator.choice([*values, data[source : source + length]])
        path.write_bytes(data)
        try:
            found = ShardedSource(path)
        except (FileFault, TensorFault) as e:
            longest = max(longest, len(e.message))
            continue
        found.close()
        accepted += 1
        assert found.tensors == expected.tensors
        assert found.files == expected.files
    assert 0 < accepted < 500
    assert longest < 5000


def test_shards_without_their_index(sharded: Path, gptj):
    (sharded / INDEX).unlink()
    done = gptj("convert", sharded, "--to", "tf")
    _refused(
        done, 1, "shards (model-00001-of-00006.safetensors and 5 more) without their index", INDEX
    )


def test_one_shard_of_several(sharded: Path, gptj):
    done = gptj("convert", sharded / "model-00002-of-00006.safetensors", "--to", "tf")
    _refused(done, 1, "is one of 6 shards", f"hint: name the folder that holds them and their "
             f"index: {sharded}")  # fmt: skip


def test_a_shard_that_is_no_file(sharded: Path, gptj):
    """Opening a pipe would block forever."""
    shard = sharded / "model-00003-of-00006.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    _refused(gptj("convert", sharded, "--to", "tf"), 1, f"shard {shard.name} does not exist")


# Writing.


def test_what_is_written_loads_in_transformers_bit_for_bit(converted: Path, hf: Path, gptj):
    done = gptj("convert", converted, "--to", "hf", "--max-shard-size", LIMIT)
    assert done.code == 0, done.stderr
    model, info = AutoModelForCausalLM.from_pretrained("converted-hf", output_loading_info=True)
    assert not any(info.values())
    state = load_file(hf / "model.safetensors")
    assert _same_bits({k: v for k, v in model.state_dict().items() if k in state}, state)
    assert len(list(Path("converted-hf").glob("*.safetensors"))) == 6
    assert gptj("verify", "converted-hf").code == 0


def test_the_index_is_that_of_transformers(sharded: Path, gptj):
    """Only the order of the tensors differs: it is the table's."""
    assert gptj("convert", sharded, "--to", "hf", "--max-shard-size", LIMIT).code == 0
    ours, theirs = (Path(folder, INDEX).read_text() for folder in ("converted-hf", "sharded"))
    assert json.loads(ours)["metadata"] == json.loads(theirs)["metadata"]
    assert json.loads(ours).keys() == json.loads(theirs).keys()
    for text in (ours, theirs):
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


@on_one_path
@given(limit=st.integers(1, 450_000))
@example(limit=4 * ROWS * WIDTH)  # just the embedding
@example(limit=4 * ROWS * WIDTH + 4 * WIDTH)  # and just the norm after it
def test_any_limit_divides_as_the_hub_does(limit: int, hf: Path, gptj):
    assert gptj("convert", hf, "--to", "hf", "--max-shard-size", limit, "--force").code == 0
    out = Path("converted-hf")
    state = load_file(hf / "model.safetensors")
    names = [t.hf for t in table(GPTJConfig.from_file(hf / "config.json"))]
    expected = split_state_dict_into_shards_factory(
        {name: state[name] for name in names},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    found = {path.name: set(load_file(path)) for path in out.glob("*.safetensors")}
    assert found == {k: set(v) for k, v in expected.filename_to_tensors.items()}
    assert (out / INDEX).exists() is expected.is_sharded
    if expected.is_sharded:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == expected.tensor_to_filename
        assert index["metadata"]["total_size"] == expected.metadata["total_size"]
    assert _same_bits(_state(out), state)
    assert gptj("convert", out, "--to", "hf", "--out", "whole", "--force").code == 0
    assert _same_bits(load_file("whole/model.safetensors"), state)


@pytest.mark.parametrize(
    ("size", "expected"),
    [("100000", 100_000), ("100KB", 100_000), ("100kb", 100_000), ("0.1MB", 100_000),
     ("100 KiB", 102_400), ("0.0001GB", 100_000), ("1MiB", 2**20)],
)  # fmt: skip
def test_sizes_are_read_as_transformers_reads_them(size: str, expected: int, hf: Path, gptj):
    outs = ("a", "b")
    for out, limit in zip(outs, (size, expected), strict=True):
        assert gptj("convert", hf, "--to", "hf", "--max-shard-size", limit, "--out", out).code == 0
    assert {p.name for p in Path("a").iterdir()} == {p.name for p in Path("b").iterdir()}
    for path in Path("a").iterdir():
        assert path.read_bytes() == Path("b", path.name).read_bytes(), path.name


@pytest.mark.parametrize("size", ["", "0", "-1", "1e9", "2XB", "GB", "nan", "0.5", "1" * 30])
def test_sizes_that_are_none(size: str, hf: Path, gptj):
    for command in (("convert", hf, "--to", "hf"), ("new",)):
        done = gptj(*command, "--max-shard-size", size)
        assert done.code == 2
        assert "--max-shard-size" in done.stderr


def test_a_bundle_has_no_shards(hf: Path, gptj):
    _refused(gptj("convert", hf, "--to", "tf", "--max-shard-size", "1GB"), 2, "--to hf")


def test_more_shards_than_can_be_read_back(workdir: Path, gptj):
    make_checkpoint(workdir / "deep", n_layer=40, n_embd=8, rotary_dim=2, vocab_size=8)
    done = gptj("convert", "deep", "--to", "hf", "--max-shard-size", "1", "--dry-run")
    _refused(done, 2, "would make 405 files, expected at most 400")
    done = gptj("new", "--max-shard-size", "1", "--set", "n_layer=40", "--set", "vocab_size=8")
    _refused(done, 2, "expected at most 400")
    assert not Path("gpt-j-new").exists()


def test_new_writes_shards(workdir: Path, gptj):
    options = ("--set", "n_layer=2", "--set", "vocab_size=300", "--seed", "3")
    assert gptj("new", "--out", "one", *options).code == 0
    assert gptj("new", "--out", "many", *options, "--max-shard-size", "200KB").code == 0
    assert (workdir / "many" / INDEX).exists()
    assert _same_bits(_state(Path("one")), _state(Path("many")))
    assert AutoModelForCausalLM.from_pretrained("many").config.vocab_size == 300
