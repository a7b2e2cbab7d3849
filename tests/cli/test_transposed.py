"""The layout of the public GPT-J-6B's own file, through every command that reads a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptj_convert.conversion.random_checkpoint import write_random_checkpoint
from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from gptj_model.config import GPTJConfig
from tests.cli.fake_hub import FakeHub, client_alone, point_at, serving
from tests.conftest import make_checkpoint, write_records
from tests.public_layout import public_state, write_public_bin

full = pytest.mark.full
DATA = "tf_model.ckpt.data-00000-of-00001"
RUN = "model.ckpt-1.data-00000-of-00001"


@pytest.fixture
def public(hf: Path) -> Path:
    """./public: ./hf in the public repository's layout."""
    folder = shutil.copytree(hf, "public")
    write_public_bin(Path(folder))
    return Path(folder)


@pytest.mark.parametrize(
    ("dtype", "shards"),
    [
        *(("float32", 1), ("float16", 3), ("bfloat16", 1)),
        *(pytest.param(*p, marks=full) for p in (("float32", 3), ("float16", 1), ("bfloat16", 3))),
    ],
)
def test_it_becomes_the_same_bytes(dtype: str, shards: int, workdir: Path, small_pieces, gptj):
    hf = make_checkpoint(workdir / "hf", dtype=dtype)
    public = Path(shutil.copytree(hf, "public"))
    write_public_bin(public, shards=shards)
    for target, files in {
        "tf": (DATA, "tf_model.ckpt.index"),
        "hf": ("model.safetensors",),
        "cs": ("model.mdl",),
        "keras": ("model.weights.h5",),
    }.items():
        for source in (hf, public):
            done = gptj("convert", source, "--to", target, "--out", f"{source.name}-{target}")
            assert done.code == 0, done.stderr
        for file in files:
            ours = Path(f"public-{target}", file).read_bytes()
            assert ours == Path(f"hf-{target}", file).read_bytes()


def test_to_tensorflow_it_is_a_copy(public: Path, hf: Path, gptj):
    lines = gptj("convert", public, "--to", "tf", "--dry-run").stdout.splitlines()
    assert len(lines) > 20
    assert all("  copy  " in line for line in lines)
    lines = gptj("convert", public, "--to", "hf", "--dry-run").stdout.splitlines()
    transposed = {line.split()[0] for line in lines if "  transpose  " in line}
    state = public_state(hf)
    assert transposed == {n for n, v in state.items() if v.dim() == 2 and "wte" not in n}


def test_inspect_shows_the_tensors_and_no_difference(public: Path, hf: Path, gptj):
    done = gptj("inspect", public, "--diff", hf, "--json")
    assert done.code == 0
    assert done.json["differences"]["outcome"] == "identical"
    ours, theirs = (
        {t["name"]: t["stats"] for t in gptj("inspect", x, "--stats", "--json").json["tensors"]}
        for x in (public, hf)
    )
    for name, figures in theirs.items():
        assert ours[name] == pytest.approx(figures, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("level", ["logits", pytest.param("all", marks=full)])
def test_verify_passes(level: str, public: Path, gptj):
    assert gptj("convert", public, "--to", "tf").code == 0
    done = gptj("verify", "--level", level, "--json")
    assert done.code == 0, done.stderr
    assert all(level["ok"] for level in done.json["levels"].values())


def test_verify_names_a_fault_as_for_any_other(public: Path, gptj):
    assert gptj("convert", public, "--to", "hf").code == 0
    path = Path("converted-hf/model.safetensors")
    state = load_file(path)
    name = "transformer.h.1.mlp.fc_in.weight"
    state[name] = state[name].t().reshape(state[name].shape)
    save_file(state, path, {"format": "pt"})
    done = gptj("verify", "converted-hf", "--level", "weights", "--json")
    assert done.code == 3
    assert done.json["first_difference"]["tensor"]["hf"] == name
    assert "it is transposed, and must not be" in json.dumps(done.json)


def test_a_changed_source_is_no_mismatch(public: Path, gptj):
    assert gptj("convert", public, "--to", "tf").code == 0
    state = torch.load(public / "pytorch_model.bin", weights_only=True)
    state["lm_head.weight"][3, 2] += 1
    torch.save(state, public / "pytorch_model.bin")
    done = gptj("verify", "--level", "weights")
    assert done.code == 1
    assert "has changed since it was converted" in done.stderr


def test_runs_and_texts_are_those_of_the_original(public: Path, hf: Path, gptj):
    for options in ((), ("--execution", "streaming")):
        said = [
            gptj("generate", "--model", x, "--ids", "4,3,2", "--max-new-tokens", "8", *options)
            for x in (public, hf)
        ]
        assert said[0].code == 0, said[0].stderr
        assert said[0].stdout == said[1].stdout


def test_training_begins_with_the_same_weights(public: Path, hf: Path, gptj):
    Path("data").mkdir()
    rows = (np.arange(16) + 16 * n for n in range(4))
    write_records(Path("data/a.tfrecord"), [(r, np.ones(16, int), r + 1) for r in rows])
    assert gptj("convert", hf, "--to", "tf").code == 0
    for source in (hf, public):
        done = gptj(
            *("train", "--init-from", source, "--model-dir", f"run-{source.name}"),
            *("--max-steps", "1", "--set", "train_input.batch_size=4"),
            *("--params", "converted/params.yaml", "--set", "train_input.max_sequence_length=16"),
        )
        assert done.code == 0, done.stderr
    (ours, theirs) = (Path(f"run-{x.name}/{RUN}").read_bytes() for x in (public, hf))
    assert ours == theirs


def test_an_optimizers_state_lies_as_its_weights_do(public: Path, hf: Path, gptj):
    """AdamW makes its moments with the strides of the weights, and torch.save keeps those."""
    shutil.copytree(hf, "rows")
    for folder, state in (
        (public, public_state(hf)),
        (Path("rows"), load_file(hf / "model.safetensors")),
    ):
        weights = [v for n, v in state.items() if ".attn.bias" not in n and "masked" not in n]
        parameters = [torch.nn.Parameter(w) for w in weights]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for n, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(n)
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer.step()
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    moment = torch.load(public / "optimizer.pt", weights_only=True)["state"]
    assert any(m["exp_avg"].stride()[:1] == (1,) != m["exp_avg"].shape[1:] for m in moment.values())
    options = ("--to", "tf", "--optimizer-state")
    for folder in (public, Path("rows")):
        done = gptj("convert", folder, *options, "--out", f"{folder.name}-tf")
        assert done.code == 0, done.stderr
    assert Path("public-tf", DATA).read_bytes() == Path("rows-tf", DATA).read_bytes()


def test_views_of_one_fused_projection_convert(hf: Path, gptj):
    """Splitting a fused weight saves three views of its storage, here column by column."""
    state = public_state(hf)
    width = state["transformer.h.0.attn.q_proj.weight"].shape[0]
    for i in range(2):
        names = [f"transformer.h.{i}.attn.{p}_proj.weight" for p in "qkv"]
        fused = torch.cat([state[n].t() for n in names], dim=1)
        for n, name in enumerate(names):
            state[name] = fused[:, n * width : (n + 1) * width].t()
    Path("fused").mkdir()
    shutil.copy("hf/config.json", "fused")
    torch.save(state, "fused/pytorch_model.bin")
    for source in ("hf", "fused"):
        assert gptj("convert", source, "--to", "tf", "--out", f"{source}-tf").code == 0
    assert Path("fused-tf", DATA).read_bytes() == Path("hf-tf", DATA).read_bytes()


def test_new_writes_it_for_torch_too(workdir: Path, gptj):
    options = (
        "--set",
        "n_layer=1",
        "--set",
        "n_embd=16",
        "--set",
        "n_head=2",
        "--dtype",
        "float16",
    )
    done = gptj("new", "--out", "a", *options, "--set", "rotary_dim=4")
    assert done.code == 0, done.stderr
    more = ("--file-format", "bin", "--layout", "transposed", "--max-shard-size", "1MB")
    assert gptj("new", "--out", "b", *options, "--set", "rotary_dim=4", *more).code == 0
    wanted = load_file("a/model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path("b").glob("*.bin")):
        found |= torch.load(file, weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert found["lm_head.weight"].stride() == (1, 50400)
    assert gptj("new", "--out", "c", "--layout", "transposed").code == 2


# The four lines of the README, on a hub whose repository is made as the public one is.


@pytest.fixture
def public_hub(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    config = GPTJConfig.preset("tiny", n_layer=1, n_embd=32, n_head=2, rotary_dim=8, n_positions=64)
    for _ in write_random_checkpoint(config, workdir / "made", seed=3, dtype="float16"):
        pass
    write_public_bin(workdir / "made")
    write_tokenizer(workdir / "made")
    files = {p.name: p.read_bytes() for p in (workdir / "made").iterdir()}
    files |= dict.fromkeys(("README.md", "flax_model.msgpack", "tf_model.h5"), b"x")
    shutil.rmtree(workdir / "made")
    hub = FakeHub(files, repository="EleutherAI/gpt-j-6b")
    home = workdir.with_name(f"{workdir.name}-home")
    with client_alone(home, monkeypatch), serving(hub) as endpoint:
        point_at(endpoint, monkeypatch)
        yield hub


def test_the_four_lines_of_the_readme(public_hub: FakeHub, gptj):
    assert gptj("download").code == 0
    assert "pytorch_model.bin" in public_hub.fetched
    assert "tf_model.h5" not in public_hub.fetched
    assert gptj("convert", "--to", "tf").code == 0
    verified = gptj("verify", "--tolerance", "1e-4")
    assert verified.code == 0, verified.stderr
    assert "MATCH" in verified.stdout
    without = gptj("train", "--init-from", "converted/")
    assert without.code == 2
    assert "gptj data" in without.stderr
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("the cat sat on the mat. " * 600)
    made = gptj(
        *("data", "text", "texts", "--tokenizer", "gpt-j-6b", "--max-sequence-length", "64"),
        *("--out", "data"),
    )
    assert made.code == 0, made.stderr
    trained = gptj("train", "--init-from", "converted/", "--max-steps", "1")
    assert trained.code == 0, trained.stderr
    assert Path("model_dir/model.ckpt-1.index").is_file()
