"""optimizer.pt, compared with PyTorch's own reading and writing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptj_convert.formats.containers.layout import Layout
from gptj_convert.formats.layouts.torch_optimizer import OptimizerSource, optimizer_file
from gptj_model.config import GPTJConfig
from gptj_model.errors import FileFault
from gptj_model.optimizer_names import Grouping, numbered_moments, parameter_groups
from gptj_model.source import TensorInfo, read_tensor
from gptj_model.tensors import Scheme
from tests.unit.writing import write

FLOATS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=9))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=5), st.dictionaries(st.text(), PLAIN))
def test_pytorch_reads_a_new_file(tmp_path_factory, arrays: list[np.ndarray], more: dict):
    folder = tmp_path_factory.mktemp("written")
    values = {f"optimizer.state.{n}.exp_avg": a for n, a in enumerate(arrays)}
    infos = {name: TensorInfo("float32", a.shape) for name, a in values.items()}
    step = np.float32(7).tobytes()
    state = {n: {"step": step, "exp_avg": name} for n, name in enumerate(values)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "params": list(state)}]
    more = {f"more {key}": value for key, value in more.items()}
    layout = Layout(infos, (optimizer_file(state, groups, more, infos),), lambda crcs: {})
    write(layout, folder, values)
    for options in ({}, {"mmap": True}):
        found = torch.load(folder / "optimizer.pt", weights_only=True, **options)
        assert found.pop("param_groups") == groups
        for n, entry in found.pop("state").items():
            assert entry["step"].item() == 7
            assert entry["exp_avg"].numpy().tobytes() == arrays[n].tobytes()
            assert entry["exp_avg"].shape == arrays[n].shape
        assert found == more


@pytest.mark.parametrize("checksums", [True, False])
def test_reads_files_that_pytorch_wrote(tmp_path: Path, checksums: bool):
    layer = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.named_parameters(), lr=1e-3)
    layer(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    source = OptimizerSource(tmp_path / "optimizer.pt")
    expected = optimizer.state_dict()
    assert source.groups == expected["param_groups"]
    for n, entry in expected["state"].items():
        for key, value in entry.items():
            found = read_tensor(source, f"optimizer.state.{n}.{key}")
            assert found.tobytes() == value.numpy().tobytes()
    source.close()


def test_weights_are_not_an_optimizer_state(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(FileFault, match="not an optimizer's state dict"):
        OptimizerSource(tmp_path / "optimizer.pt")


def _sparse(path: Path, infos: dict[str, TensorInfo], last: np.float32) -> None:
    """Write a sparse file of these tensors, with only the last value present."""
    state = {n: {"step": last.tobytes(), "exp_avg": name} for n, name in enumerate(infos)}
    with path.open("wb") as f:
        for part in optimizer_file(state, [{"params": list(state)}], {}, infos).parts:
            if isinstance(part, bytes):
                f.write(part)
            else:
                f.seek(infos[part].nbytes - 4, 1)
                f.write(last.tobytes())


def test_beyond_four_gibibytes(tmp_path: Path):
    """Beyond this size, a zip archive needs 8-byte fields."""
    path = tmp_path / "optimizer.pt"
    infos = {
        f"optimizer.state.{n}.exp_avg": TensorInfo("float32", (2**18, 2**11)) for n in (0, 1, 2)
    }
    _sparse(path, infos, np.float32(3))
    found = torch.load(path, weights_only=True, mmap=True)["state"]
    assert [entry["exp_avg"][-1, -1].item() for entry in found.values()] == [3, 3, 3]
    source = OptimizerSource(path)
    assert {n: i for n, i in source.tensors.items() if n.endswith("exp_avg")} == infos
    source.close()


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_in_the_order_of_transformers(tied: bool):
    from transformers import GPTJConfig as HFConfig
    from transformers import GPTJForCausalLM
    from transformers.trainer_pt_utils import get_parameter_names

    config = GPTJConfig.preset("tiny", tie_word_embeddings=tied)
    with torch.device("meta"):
        model = GPTJForCausalLM(HFConfig(**config.to_hf(dtype="float32")))
        model.tie_weights()
    rows = dict(model.named_parameters())
    ((*ours,),) = parameter_groups(config, Scheme.HF, Grouping.ONE)
    assert [(t.hf, t.shape) for t in ours] == [(n, tuple(p.shape)) for n, p in rows.items()]
    decayed = get_parameter_names(model, [torch.nn.LayerNorm], [r"bias", r"layernorm", r"_norm$"])
    both = [[n for n in rows if (n in decayed) is wanted] for wanted in (True, False)]
    groups = parameter_groups(config, Scheme.HF, Grouping.DECAY)
    assert [[t.hf for t in group] for group in groups] == both


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", [Scheme.HF, Scheme.CS])
def test_every_optimizer_slot_has_its_own_number(scheme: Scheme, tied: bool):
    config = GPTJConfig.preset("tiny", tie_word_embeddings=tied)
    names = [n for pair in numbered_moments(config, scheme, Grouping.DECAY).values() for n in pair]
    assert len(set(names)) == len(names)
