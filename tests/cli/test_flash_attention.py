"""`model.flash_attention`: refused where it cannot be, and equal to the plain product. On a CPU the
kernel is XLA's, in a process of its own: Keras has one backend in each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.config.flash_attention import has_kernel
from tests.conftest import GOLDEN_RUNS, eight_devices

ON = ("--set", "model.flash_attention=true")
HALF = ("--set", "model.mixed_precision=true", "--set", "model.mixed_precision_dtype=bfloat16")
BEGIN = ("train", "--init-from", "hf", "--params", "params.yaml")

_PROGRAM = """
import json, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np

from runner.cli.root import main
from runner.cli.shared import framework
framework.prepare(backend="jax")
import jax, jax.numpy as jnp
from gptj_model.config import GPTJConfig
from gptj_model.errors import GptjError
from gptj_model.network.flash_attention import flash_attention
from gptj_model.network.stacked import StackedModel
from gptj_model.tensors import table
from gptj_model.network.device_arrays import DeviceArrays
from gptj_model.sharding import BATCH, MODEL, Mesh, axes
from runner.config.params_file import load_params
from runner.evaluation.flash_attention import check_device, prove

config = GPTJConfig.preset("tiny", n_layer=2, vocab_size=96, n_positions=32)
xla = flash_attention(config, "xla")
mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (2, 4)), (BATCH, MODEL))
arrays = DeviceArrays(table(config), mesh, axes=partial(axes, mesh=Mesh(2, 4)))
random = np.random.default_rng(5)
for row in arrays:
    shape = arrays.row(row).shape
    centre = float(len(shape) == 1)
    arrays.row(row).assign(centre + random.normal(0, shape[0] ** -0.5, shape).astype("f4"))
ids, labels = random.integers(0, 96, (2, 4, 24), dtype=np.int32)
ignored = np.tile(np.arange(24) > 19, (4, 1)).astype("f4")  # padding on the right

@partial(jax.jit, static_argnames=("attend", "recompute"))
def run(weights, attend, recompute):
    model = StackedModel(config, dtype="float32", recompute=recompute, devices=8, attend=attend)
    key = jnp.zeros(2, jnp.uint32)
    loss, gradients = model.gradients(
        weights, {}, (ids, ignored, labels), key, jnp.float32(1)
    )
    return loss, model.losses(weights, (ids, ignored, labels)).mean, gradients

def furthest(recompute):
    plain, fused = (jax.device_get(run(arrays.values, a, recompute)) for a in (None, xla))
    far = max(np.abs(plain[2][k] - fused[2][k]).max() / np.abs(plain[2][k]).max() for k in plain[2])
    losses = [abs(plain[n] - fused[n]) / plain[n] for n in (0, 1)]
    return [float(max(losses)), float(far)]

def wrong(scale):
    return lambda q, k, v: xla(scale * q, k, v)

def wide(q, k, v):
    return jax.nn.dot_product_attention(
        *(x.astype(v.dtype) for x in (q, k, v)), scale=config.head_dim**-0.5)

def told(call):
    try:
        return call()
    except GptjError as e:
        return f"{type(e).__name__}: {e.message}"

gpu = SimpleNamespace(device_kind="NVIDIA A100", platform="gpu", compute_capability="8.0",
                      client=SimpleNamespace(platform_version="cuda 13"))
params = load_params(Path("params.yaml"), {
    "model.flash_attention": True, "model.mixed_precision": True,
    "model.mixed_precision_dtype": "bfloat16", "runconfig.backend": "jax",
})
proof = partial(prove, config, params)
found = {
    "kept": furthest(False),
    "recomputed": furthest(True),
    "proven": proof(xla),
    "wrong scale": told(lambda: proof(wrong(1.1))),
    "not causal": told(lambda: proof(wide)),
    "not a number": told(lambda: proof(wrong(float("nan")))),
    "A100": told(lambda: check_device(gpu, 256)),
    "A100, small heads": told(lambda: check_device(gpu, 64)),
    "refused": main(json.loads(sys.argv[1])),
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program above found, on eight virtual devices."""
    folder = tmp_path_factory.mktemp("flash") / "adamw"
    shutil.copytree(GOLDEN_RUNS / "adamw", folder)
    environment = eight_devices() | {"PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [*BEGIN, *ON, *HALF, "--backend", "jax", "--set", "runconfig.mesh=[1,1]"]
    command = [sys.executable, "-c", _PROGRAM, json.dumps(arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@pytest.mark.parametrize("way", ["kept", "recomputed"])
def test_losses_and_gradients_are_those_of_the_plain_product(way: str, found: dict[str, Any]):
    """In float32, on two by four devices, with padding on the right."""
    of_losses, of_gradients = found[way]
    assert of_losses < 1e-6
    assert of_gradients < 1e-5


def test_the_guard(found: dict[str, Any]):
    assert 0 < max(found["proven"].values()) < 5e-3  # half of the tolerance
    for fault in ("wrong scale", "not causal", "not a number"):
        assert found[fault].startswith(
            "TrainingFault: flash attention differs from the plain product by"
        )


def test_the_device_must_have_the_kernel(found: dict[str, Any]):
    assert found["refused"] == 2
    assert (
        "JAX computes with cpu (cpu), expected an NVIDIA GPU of compute capability 8.0 or more: "
        "heads have 16 features" in found["stderr"]
    )
    told = "NVIDIA A100, compute capability 8.0, expected an NVIDIA GPU of compute capability 9.0"
    assert told in found["A100"]
    assert found["A100, small heads"] is None


@pytest.mark.parametrize(
    ("capability", "features", "expected"),
    [
        ((7, 5), 64, False),
        ((8, 0), 128, True),
        ((8, 9), 256, False),
        ((9, 0), 256, True),
        ((10, 0), 256, True),
        ((10, 0), 192, False),
        ((12, 0), 256, False),
    ],
)
def test_generations_of_gpus(capability: tuple[int, int], features: int, expected: bool):
    assert has_kernel(capability, features) is expected


REFUSED = {
    "backend": (HALF, "runconfig.backend is tensorflow, expected jax"),
    "precision": (("--backend", "jax"), "model.mixed_precision is false, expected true"),
    "dropout": (
        (*HALF, "--backend", "jax", "--set", "model.attention_dropout_rate=0.1"),
        "model.attention_dropout_rate is 0.1, expected 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_what_does_not_fit_is_refused(golden_run: Path, case: str, gptj):
    options, expected = REFUSED[case]
    done = gptj(*BEGIN, *ON, *options, "--validate-only")
    assert done.code == 2
    assert expected in done.stderr
    assert "--set model.flash_attention=false" in done.stderr
