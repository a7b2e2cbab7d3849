"""The Keras layout: Keras loads it, and it is a source like any other."""

from __future__ import annotations

from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from gptj_convert.conversion.random_checkpoint import write_random_checkpoint
from gptj_model.config import GPTJConfig
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import variables
from gptj_model.tensors import Scheme, table
from tests.conftest import load_tensors, make_checkpoint

WEIGHTS = Path("converted-keras/model.weights.h5")


def _tree(path: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item.shape

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_keras_loads_it(dtype: str, tied: bool, workdir: Path, small_pieces: None, gptj):
    make_checkpoint(workdir / "hf", dtype=dtype, tie_word_embeddings=tied)
    assert gptj("convert", "hf", "--to", "keras").code == 0
    source = load_tensors(workdir / "hf/model.safetensors")
    by_archive = keras.saving.load_model("converted-keras/model.keras")
    by_weights = GPTJ(GPTJConfig.from_file(Path("converted-keras/config.json")))
    by_weights.load_weights(WEIGHTS)
    for model in (by_archive, by_weights):
        found = variables(model)
        for tensor in table(model.config):
            expected = tensor.op(Scheme.HF, Scheme.KERAS)(source[tensor.hf]).astype(np.float32)
            assert np.array_equal(np.asarray(found[tensor.hf]), expected), tensor
    ids = np.arange(20)[None]
    assert np.array_equal(by_archive(ids), by_weights(ids))


def test_it_is_what_keras_writes(hf: Path, gptj):
    assert gptj("convert", hf, "--to", "keras").code == 0
    model = keras.saving.load_model("converted-keras/model.keras")
    model.save_weights("theirs.weights.h5")
    assert _tree(Path("theirs.weights.h5")) == _tree(WEIGHTS)
    # And theirs is a source: the same tensors, of a file that we did not lay out.
    Path("theirs").mkdir()
    Path("theirs.weights.h5").rename("theirs/model.weights.h5")
    Path("converted-keras/config.json").rename("theirs/config.json")
    assert gptj("convert", "theirs", "--to", "hf").code == 0
    ours, original = (load_tensors(Path(d) / "model.safetensors") for d in ("converted-hf", hf))
    assert ours.keys() == original.keys()
    assert all(np.array_equal(ours[n], original[n]) for n in original)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["hf", "tf"])
def test_the_round_trip_is_bit_for_bit(
    dtype: str, tied: bool, target: str, workdir: Path, small_pieces: None, gptj
):
    make_checkpoint(workdir / "hf", dtype=dtype, tie_word_embeddings=tied)
    assert gptj("convert", "hf", "--to", "keras").code == 0
    assert gptj("verify", "converted-keras", "--level", "weights").code == 0
    to = ("--to", target, "--dtype", "keep", "--out", "there")
    assert gptj("convert", "converted-keras", *to).code == 0
    assert gptj("verify", "there", "--against", "hf", "--level", "weights").code == 0
    assert gptj("inspect", "there", "--diff", "converted-keras").code == 0


def test_many_blocks_keep_their_numbers(workdir: Path, gptj):
    config = GPTJConfig.preset("tiny", n_layer=12, n_embd=16, n_head=2, rotary_dim=4, vocab_size=99)
    for _ in write_random_checkpoint(config, workdir / "hf", seed=1, dtype="float32"):
        pass
    assert gptj("convert", "hf", "--to", "keras").code == 0
    assert gptj("verify", "converted-keras").code == 0


def test_a_damaged_file_is_named(hf: Path, gptj):
    assert gptj("convert", hf, "--to", "keras").code == 0
    raw = bytearray(WEIGHTS.read_bytes())
    value = load_tensors(hf / "model.safetensors")["transformer.ln_f.bias"].tobytes()
    raw[raw.index(value)] ^= 1
    WEIGHTS.write_bytes(raw)
    done = gptj("verify", "converted-keras", "--json")
    assert done.code == 3
    assert done.json["first_difference"]["tensor"]["hf"] == "transformer.ln_f.bias"
    WEIGHTS.write_bytes(raw[:-1000])
    assert gptj("verify", "converted-keras").code == 3


# HDF5 files that are not plain datasets in one file. Refused before data is read.


def _external(file: h5py.File) -> None:
    file.create_dataset("w", (4,), "f4", external=[("/etc/passwd", 0, 16)])


def _external_link(file: h5py.File) -> None:
    file["w"] = h5py.ExternalLink("other.h5", "/w")


def _soft_link_loop(file: h5py.File) -> None:
    file["a"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/a")


def _hard_link_loop(file: h5py.File) -> None:
    group = file.create_group("a")
    for n in range(9):
        group[f"again{n}"] = group


def _objects(file: h5py.File) -> None:
    file.create_dataset("w", data=["text"], dtype=h5py.string_dtype())


def _huge(file: h5py.File) -> None:
    file.create_dataset("w", (2**60,), "f4", chunks=(2**20,))


def _compressed(file: h5py.File) -> None:
    file.create_dataset("w", data=np.zeros(1000), compression="gzip")


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "w", (4,))
    file.create_virtual_dataset("w", layout)


@pytest.mark.parametrize(
    "damage",
    [_external, _external_link, _soft_link_loop, _hard_link_loop, _objects, _huge, _compressed,
     _virtual],
)  # fmt: skip
def test_files_that_lead_elsewhere(damage, hf: Path, gptj):
    Path("bad").mkdir()
    (hf / "config.json").rename("bad/config.json")
    with h5py.File("bad/model.weights.h5", "w") as file:
        damage(file)
    done = gptj("convert", "bad", "--to", "hf", "--out", "out")
    assert done.code == 1
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "model.weights.h5" in done.stderr
    assert not Path("out").exists()
