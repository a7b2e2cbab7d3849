"""The mesh of devices that a run on JAX is divided among."""

from __future__ import annotations

from collections.abc import Callable

from gptj_model.errors import ConfigError
from gptj_model.sharding import Mesh, check_divides
from runner.config.params import Params


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
