"""The table against everything that names GPT-J's tensors."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from crc32c import crc32c

from gptj_model.config import GPTJConfig
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import variables
from gptj_model.sharding import BATCH, MODEL, Mesh, axes, part_size
from gptj_model.source import read_tensor
from gptj_model.tensors import Role, Scheme, ignored_hf, is_training_state, slot_name, table
from tests.conftest import GOLDEN_RUNS, SMALL, load_tensors

SIX_B = GPTJConfig()
SMALL_CONFIG = GPTJConfig.preset("tiny", **SMALL)
TIED = replace(SMALL_CONFIG, tie_word_embeddings=True)


def test_6b_has_its_published_tensors_and_parameters():
    assert len(table(SIX_B)) == 285
    assert sum(t.size for t in table(SIX_B)) == 6_050_882_784


@pytest.mark.parametrize("config", [SIX_B, TIED], ids=["6b", "tied"])
@pytest.mark.parametrize("scheme", Scheme)
def test_names_are_unique_in_every_scheme(config: GPTJConfig, scheme: Scheme):
    names = [name for t in table(config) for name in (t.name(scheme), *t.copies(scheme))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("config", [SIX_B, SMALL_CONFIG, TIED], ids=["6b", "small", "tied"])
def test_names_and_shapes_are_those_of_transformers(config: GPTJConfig):
    with torch.device("meta"):
        hf_config = transformers.GPTJConfig(**config.to_hf(dtype="float32"))
        model = transformers.GPTJForCausalLM(hf_config)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    expected = {k: v for k, v in state.items() if k not in ignored_hf(config)}
    if config.tie_word_embeddings:
        # transformers lists the tied head; its files do not hold it.
        del expected["lm_head.weight"]
    assert {t.hf: t.shape for t in table(config)} == expected


@pytest.mark.parametrize("config", [SMALL_CONFIG, TIED], ids=["small", "tied"])
def test_names_and_shapes_are_those_of_the_keras_model(config: GPTJConfig):
    found = {hf: tuple(v.shape) for hf, v in variables(GPTJ(config)).items()}
    assert found == {t.hf: t.shape_in(Scheme.KERAS) for t in table(config)}


@pytest.mark.parametrize("case", ["adamw", "shared_embedding"])
def test_names_and_shapes_are_those_of_the_reference(case: str):
    from gptj_convert.formats.containers.tensor_bundle import BundleSource

    folder = GOLDEN_RUNS / case
    config = GPTJConfig.from_file(folder / "hf/config.json")
    source = BundleSource(folder / "tf_model.ckpt")
    weights = {n: i.shape for n, i in source.tensors.items() if not is_training_state(n, Scheme.TF)}
    assert weights == {t.tf: t.shape_in(Scheme.TF) for t in table(config)}
    assert read_tensor(source, "global_step") == 0


@pytest.mark.parametrize("case", ["adamw", "shared_embedding"])
def test_training_state_of_the_reference_is_told_from_weights(case: str):
    from gptj_convert.formats.containers.tensor_bundle import BundleSource

    folder = GOLDEN_RUNS / case
    config = GPTJConfig.from_file(folder / "hf/config.json")
    names = set(BundleSource(folder / "ckpt/model.ckpt-20").tensors)
    weights = {t.tf for t in table(config)}
    slots = {slot_name(w, s) for w in weights for s in ("AdamW", "AdamW_1")}
    assert weights | slots <= names
    assert all(is_training_state(n, Scheme.TF) for n in names - weights)
    assert not any(is_training_state(n, Scheme.TF) for n in weights)


@pytest.mark.parametrize(
    ("scheme", "kept", "weights"),
    [
        (
            Scheme.TF,
            ["global_step", "skipped_steps", "lora_alpha", "a/b/AdamW_1", "a/lora_base",
             "a/k_grad_accum_3", "summary_hook_counter", "a/SGDM"],
            ["AdamW", "a/AdamW/b", "lora_base/a", "a/global_step", "a_hook_counter_b", "bias"],
        ),
        (
            Scheme.CS,
            ["optimizer.state.0.exp_avg", "__metadata__", "schedulers.0"],
            ["optimizers.0", "model.optimizer", "lm_head.weight"],
        ),
        (Scheme.HF, [], ["global_step", "optimizer.state"]),
    ],
)  # fmt: skip
def test_training_state_is_told_by_name(scheme: Scheme, kept: list[str], weights: list[str]):
    assert [n for n in kept if not is_training_state(n, scheme)] == []
    assert [n for n in weights if is_training_state(n, scheme)] == []


def test_names_shapes_and_values_are_those_of_the_cs_client():
    config = GPTJConfig.from_file(GOLDEN_RUNS / "adamw/hf/config.json")
    weights = load_tensors(GOLDEN_RUNS / "adamw/hf/model.safetensors")
    found = {
        name: {"shape": list(t.shape), "crc32c": f"{crc32c(weights[t.hf].tobytes()):08x}"}
        for t in table(config)
        for name in (t.name(Scheme.CS), *t.copies(Scheme.CS))
    }
    assert found == json.loads((GOLDEN_RUNS / "cs_tensors.json").read_text())


@pytest.fixture
def fresh() -> ModuleType:
    """Import the table's module again: its rows are made during the import."""
    spec = importlib.util.find_spec("gptj_model.tensors")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", ["adamw", "shared_embedding"])
def test_rows_are_made_as_four_sides_name_them(fresh: ModuleType, case: str):
    from gptj_convert.formats.containers.safetensors import SafetensorsSource
    from gptj_convert.formats.containers.tensor_bundle import BundleSource

    config = GPTJConfig.from_file(GOLDEN_RUNS / case / "hf/config.json")
    rows = fresh.table(config)
    files = (
        SafetensorsSource(GOLDEN_RUNS / case / "hf/model.safetensors"),
        BundleSource(GOLDEN_RUNS / case / "tf_model.ckpt"),
    )
    hf, tf = ({n: i.shape for n, i in f.tensors.items() if n != fresh.GLOBAL_STEP} for f in files)
    assert {t.hf: t.shape for t in rows} == hf
    assert {t.tf: t.shape_in(fresh.Scheme.TF) for t in rows} == tf
    keras = {v.path.removeprefix("gptj/"): tuple(v.shape) for v in GPTJ(config).weights}
    assert {t.keras: t.shape_in(fresh.Scheme.KERAS) for t in rows} == keras
    assert [t.block for t in rows] == [None, *(i for i in range(config.n_layer) for _ in range(10)),
                                       *[None] * len(fresh.head(config))]  # fmt: skip
    assert fresh.ignored_hf(config) == {
        f"transformer.h.{i}.attn.{name}"
        for i in range(config.n_layer)
        for name in ("bias", "masked_bias")
    }
    assert [t.hf for t in fresh.vocabulary(config)] == [
        t.hf for t in rows if t.shape[0] == config.vocab_size
    ]
    head = () if case == "adamw" else ("lm_head.weight",)
    assert fresh.embedding(config).copies(fresh.Scheme.CS) == head
    if case == "adamw":
        cs = json.loads((GOLDEN_RUNS / "cs_tensors.json").read_text())
        names = {n for t in rows for n in (t.name(fresh.Scheme.CS), *t.copies(fresh.Scheme.CS))}
        assert names == set(cs)


def test_the_first_dense_layer_has_no_number():
    names = {t.tf for t in table(SMALL_CONFIG)}
    assert "gptj_decoder/0/mlp/dense_layer/dense_layer/kernel" in names
    assert "gptj_decoder/2/mlp/dense_layer_5/dense_layer_5/bias" in names


EVEN = replace(SMALL_CONFIG, vocab_size=212)


@pytest.mark.parametrize("config", [SIX_B, EVEN, replace(EVEN, tie_word_embeddings=True)],
                         ids=["6b", "small", "tied"])  # fmt: skip
def test_every_tensor_says_how_it_is_divided(config: GPTJConfig):
    for tensor in table(config):
        named, shape = axes(tensor, Mesh(1, 2)), tensor.shape_in(Scheme.KERAS)
        part = [n // 2 if axis == MODEL else n for n, axis in zip(shape, named, strict=True)]
        assert math.prod(part) == part_size(tensor, Mesh(3, 2))
        mesh = Mesh(4, 2)
        named = axes(tensor, mesh, shard_weights=True)
        assert (BATCH in named) == (None in axes(tensor, mesh))  # 4 divides every size here
        parts = {None: 1, MODEL: 2, BATCH: 4}
        part = [n // parts[axis] for n, axis in zip(shape, named, strict=True)]
        assert math.prod(part) == part_size(tensor, mesh, shard_weights=True)


#: Role, split and heads axis of every row, by layer and the last part of the HF name.
COLUMNS = {
    ("wte", "weight"): (Role.EMBEDDING, 0, None),
    ("ln_1", "weight"): (Role.GAIN, None, None),
    ("ln_1", "bias"): (Role.BIAS, None, None),
    ("q_proj", "weight"): (Role.INPUT, 0, 0),
    ("k_proj", "weight"): (Role.INPUT, 0, 0),
    ("v_proj", "weight"): (Role.INPUT, 0, 0),
    ("out_proj", "weight"): (Role.RESIDUAL, 1, 1),
    ("fc_in", "weight"): (Role.INPUT, 0, None),
    ("fc_in", "bias"): (Role.BIAS, 0, None),
    ("fc_out", "weight"): (Role.RESIDUAL, 1, None),
    ("fc_out", "bias"): (Role.BIAS, None, None),
    ("ln_f", "weight"): (Role.GAIN, None, None),
    ("ln_f", "bias"): (Role.BIAS, None, None),
    ("lm_head", "weight"): (Role.HEAD, 0, None),
    ("lm_head", "bias"): (Role.BIAS, 0, None),
}


def test_roles_splits_and_heads_of_every_row(fresh: ModuleType):
    for tensor in fresh.table(SMALL_CONFIG):
        columns = (tensor.role, tensor.split, tensor.heads_axis)
        assert columns == COLUMNS[tensor.layer, tensor.hf.rpartition(".")[2]]
    kernels = {t.layer for t in table(SMALL_CONFIG) if t.role in (Role.INPUT, Role.RESIDUAL)}
    assert kernels == set(fresh.DENSE_LAYERS)


#: Where a tensor's name may be spelled: the table, the layouts, the layers that are the network,
#: and Hugging Face's own modules.
SPELLED = ("gptj_model/tensors.py", "gptj_model/network/", "gptj_convert/formats/layouts/",
           "golden/reference.py")  # fmt: skip
NAME = re.compile(
    r"\b(?:transformer\.(?:h|wte|ln_f)|lm_head|ln_[1f]|[qkv]_proj|out_proj|fc_(?:in|out))\b"
)


def _spelled(path: Path) -> Iterator[str]:
    """Tensors' names in the strings of a module, but not in its docstrings."""
    tree = ast.parse(path.read_text())
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from (f"{path}:{node.lineno}: {found[0]}" for found in NAME.finditer(node.value))


def test_nothing_else_spells_a_tensor_name():
    modules = (
        p for package in ("gptj_model", "golden", "gptj_convert", "runner")
        for p in Path(package).rglob("*.py") if not str(p).startswith(SPELLED)
    )  # fmt: skip
    assert [found for path in modules for found in _spelled(path)] == []
