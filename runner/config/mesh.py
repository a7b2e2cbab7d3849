"""The mesh of devices that a run on JAX is divided among."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gptj_model.errors import ConfigError
from gptj_model.sharding import Mesh, check_divides
from runner.config.params import Params

#: Variable that names the kinds of devices that JAX may use.
_PLATFORMS = "JAX_PLATFORMS"


def jax_devices() -> list[Any]:
    """Return the devices of JAX, of all processes.

    Raises:
        ConfigError: JAX has none of the kind that JAX_PLATFORMS asks for.
    """
    import jax

    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:
        asked = os.environ.get(_PLATFORMS)
        reason = next(iter(str(e).splitlines()), "") or "no such device, or no support for it here"
        raise ConfigError(
            f"JAX has no device to compute on ({_PLATFORMS} is {asked!r}): {reason}",
            hint="GPUs need `pip install 'gptj-tf[gpu]'` and a driver, which `gptj doctor` shows; "
            f"to compute on the processor, set {_PLATFORMS}=cpu",
        ) from None


def mesh_of(params: Params, devices: Callable[[], tuple[int, int]]) -> Mesh:
    """Return the mesh that the parameters name, else one that divides batches among the processes
    of the run, and tensors among the devices of each.

    Args:
        params: parameters of the run.
        devices: returns the numbers of processes and of devices of each; called only if it matters.

    Raises:
        ConfigError: the mesh does not divide the model or a batch.
    """
    named = params.runconfig.mesh
    mesh = Mesh(*(named or devices()))
    check_divides(params.config, mesh)
    for name in ("train_input", "eval_input"):
        section = getattr(params, name)
        if section and section.batch_size % mesh.batch:
            raise ConfigError(
                f"{name}.batch_size is {section.batch_size}, expected a multiple of {mesh.batch}: "
                f"batches are divided along a mesh of {mesh} devices (batch × model)",
                hint="change it, or the first number of runconfig.mesh",
            )
    return mesh
