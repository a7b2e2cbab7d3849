"""The Keras backend of a run: what each cannot do, and JAX's mesh of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gptj_model.errors import ConfigError
from gptj_model.sharding import Mesh, check_divides
from runner.config.execution import Backend, Execution
from runner.config.params import Params


def check_backend(params: Params, *, mode: str, workers: int) -> None:
    """Check that the backend supports what is asked for.

    Args:
        params: parameters of the run.
        mode: mode of the command line.
        workers: number of processes that train together.

    Raises:
        ConfigError: names everything that the backend does not support.
    """
    if params.runconfig.backend != Backend.JAX:
        return
    problems = list(_refused(params, mode, workers))
    if problems:
        raise ConfigError(
            f"runconfig.backend is {Backend.JAX}, which does not know {', '.join(problems)}",
            hint="do without, or compute with --backend tensorflow",
        )


def _refused(params: Params, mode: str, workers: int) -> Iterator[str]:
    runconfig = params.runconfig
    if mode in ("eval", "eval_all"):
        yield f"mode {mode}"
    if workers > 1 or runconfig.enable_distributed:
        yield "several workers (one process has all devices)"
    if runconfig.execution != Execution.RESIDENT:
        yield f"runconfig.execution {runconfig.execution} (--set runconfig.execution=resident)"
    if runconfig.device:
        yield f"runconfig.device {runconfig.device} (--set runconfig.device=null)"


def mesh_of(params: Params, devices: Callable[[], int]) -> Mesh:
    """Return the mesh that the parameters name, else one that divides tensors among all devices.

    Args:
        params: parameters of the run.
        devices: returns the number of devices; called only if it matters.

    Raises:
        ConfigError: the mesh does not divide the model or a batch.
    """
    named = params.runconfig.mesh
    mesh = Mesh(*named) if named else Mesh(1, devices())
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
