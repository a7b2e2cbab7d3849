"""The CS client itself loads what is converted for it, and what it saves is read.

Only where GPTJ_CS_PYTHON names a Python with cerebras-pytorch: `make test-cs` makes one.
"""

from __future__ import annotations

import os
import shutil
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
    _run(CLIENT, *arguments)


def _run(program: str, *arguments: object) -> None:
    command = [str(PYTHON), "-c", program, *map(str, arguments)]
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


#: Loads a checkpoint with its optimizer's state as `cszoo fit` does, takes a step by given
#: gradients, and saves. Which parameter is which, its own checkpoint says.
STEP = """
import sys
import cerebras.pytorch as cstorch
import numpy as np
import torch

ours, own, gradients, again = sys.argv[1:]
cstorch.backend("CPU")
stored, order = cstorch.load(ours), list(cstorch.load(own)["model"])
names = [name.removeprefix("model.") for name in order if ".norm." not in name]

def copied(tensor):
    return torch.from_numpy(cstorch.to_numpy(tensor).copy())

model = {name: torch.nn.Parameter(copied(stored["model"][name])) for name in names}
sets = [[p for p in model.values() if (p.dim() > 1) is big] for big in (True, False)]
optimizer = cstorch.optim.AdamW([{"params": s} for s in sets], lr=0.5)
kinds = cstorch.optim.lr_scheduler
members = [
    kinds.LinearLR(optimizer, 0.0, 1e-3, 5),
    kinds.CosineDecayLR(optimizer, 1e-3, 1e-4, 10),
    kinds.ConstantLR(optimizer, 1e-4),
]
scheduler = kinds.SequentialLR(optimizer, schedulers=members, milestones=[5, 15])
optimizer.load_state_dict(stored["optimizer"])
(state,) = stored["schedulers"]
scheduler.load_state_dict(state)
given = np.load(gradients)
for name, parameter in model.items():
    parameter.grad = torch.from_numpy(given[name])
optimizer.step()
scheduler.step()
assert [int(s.last_epoch) for s in (scheduler, *members)] == [21, 21, 16, 6]
assert all(abs(float(group["lr"]) - 1e-4) < 1e-9 for group in optimizer.param_groups)
saved = {name: parameter.detach() for name, parameter in model.items()}
for part in ("weight", "bias"):
    saved[f"transformer_decoder.norm.{part}"] = saved[f"ln_f.{part}"].clone()
state = {
    "model": saved,
    "optimizer": optimizer.state_dict(),
    "global_step": stored["global_step"] + 1,
    "schedulers": [scheduler.state_dict()],
}
cstorch.save(state, again)
"""


def test_it_continues_a_tensorflow_run(workdir: Path, gptj):
    """A step of the client from the converted state equals a step here."""
    import numpy as np
    import tensorflow as tf

    from gptj_convert.formats.containers.tensor_bundle import BundleSource
    from gptj_model.config import GPTJConfig
    from gptj_model.source import read_tensor
    from gptj_model.tensors import Scheme, table
    from runner.config.params import OptimizerParams
    from runner.training.update.optimizer import Optimizer

    run = shutil.copytree(GOLDEN_RUNS / "adamw" / "ckpt", workdir / "run") / "model.ckpt-20"
    for name in ("params.yaml", "hf/config.json"):
        shutil.copy(GOLDEN_RUNS / "adamw" / name, run.parent)
    assert gptj("convert", run, "--to", "cs", "--optimizer-state", "--quiet").code == 0
    random = np.random.default_rng(3)
    rows = table(GPTJConfig.from_file(run.parent / "config.json"))
    gradients = {t: random.normal(size=t.shape).astype(np.float32) for t in rows}
    np.savez("gradients.npz", **{name: g for t, g in gradients.items() for name in t.cs})  # type: ignore[arg-type]
    own = GOLDEN_RUNS / "cs" / "checkpoint_20.mdl"
    _run(STEP, "converted-cs/model.mdl", own, "gradients.npz", "again.mdl")
    back = ("convert", "again.mdl", "--config", run.parent / "config.json", "--to", "tf")
    assert gptj(*back, "--optimizer-state", "--quiet").code == 0

    source = BundleSource(run)
    weights = {t: tf.Variable(read_tensor(source, t.tf)) for t in rows}
    params = OptimizerParams(
        optimizer_type="adamw",
        learning_rate=1e-4,
        epsilon=1e-6,
        weight_decay_rate=0.1,
        use_bias_correction=True,
        exclude_from_weight_decay=["ln_1", "layer_norm", "bias"],
    )
    optimizer = Optimizer(params, weights)
    assert optimizer.load(source, 20)
    values = [tf.constant(t.op(Scheme.HF, Scheme.TF)(g)) for t, g in gradients.items()]
    tf.function(optimizer.apply)(values, *optimizer.arguments(1e-4))
    optimizer.advance()
    expected = {t.tf: v for t, v in weights.items()} | optimizer.slots | optimizer.scalars()
    found = BundleSource(Path("converted/tf_model.ckpt"))
    assert set(found.tensors) == {*expected, "global_step"}
    assert read_tensor(found, "global_step") == 21
    for name, value in expected.items():
        np.testing.assert_allclose(
            read_tensor(found, name), np.asarray(value), rtol=1e-6, atol=1e-7
        )
