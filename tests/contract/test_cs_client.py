"""The CS client itself loads what is converted for it, and what it saves is read.

Only where GPTJ_CS_PYTHON names a Python with cerebras-pytorch: `make test-cs` makes one.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import GOLDEN_RUNS

PYTHON = os.environ.get("GPTJ_CS_PYTHON")
HF = GOLDEN_RUNS / "adamw" / "hf"

pytestmark = pytest.mark.skipif(not PYTHON, reason="no Python with the CS client; `make test-cs`")

#: Loads two checkpoints and compares them; saves the first again.
CLIENT = """
import sys
import cerebras.pytorch as cstorch
import torch

def bits(tensor):
    return str(tensor.dtype), tuple(tensor.shape), cstorch.to_numpy(tensor).tobytes()

ours, other, again = sys.argv[1:]
first, second = (cstorch.load(path)["model"] for path in (ours, other))
assert set(first) == set(second), set(first) ^ set(second)
if ours != other:
    differing = [name for name in first if bits(first[name]) != bits(second[name])]
    assert not differing, differing

def copied(tensor):
    values = torch.from_numpy(cstorch.to_numpy(tensor).copy())
    return values.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 else values

cstorch.save({"model": {name: copied(t) for name, t in first.items()}}, again)
"""


def _client(*arguments: object) -> None:
    command = [str(PYTHON), "-c", CLIENT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_loads_ours_as_its_own(workdir: Path, gptj):
    assert gptj("convert", HF, "--to", "cs", "--quiet").code == 0
    _client("converted-cs/model.mdl", GOLDEN_RUNS / "cs" / "model.mdl", "again.mdl")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_it_saves_is_read(dtype: str, workdir: Path, gptj):
    assert gptj("convert", HF, "--to", "cs", "--dtype", dtype, "--quiet").code == 0
    ours = Path("converted-cs/model.mdl")
    _client(ours, ours, "again.mdl")
    options = ("--against", HF, "--config", HF / "config.json", "--level", "weights")
    assert gptj("verify", "again.mdl", *options).code == 0
