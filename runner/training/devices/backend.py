"""The Keras backend of a run: what each cannot do."""

from __future__ import annotations

from collections.abc import Iterator

from gptj_model.errors import ConfigError
from runner.config.execution import Backend, Execution
from runner.config.params import Params


def check_backend(params: Params) -> None:
    """Check that the backend supports what is asked for.

    Raises:
        ConfigError: names everything that the backend does not support.
    """
    if params.runconfig.backend != Backend.JAX:
        return
    problems = list(_refused(params))
    if problems:
        raise ConfigError(
            f"runconfig.backend is {Backend.JAX}, which does not know {', '.join(problems)}",
            hint="do without, or compute with --backend tensorflow",
        )


def _refused(params: Params) -> Iterator[str]:
    runconfig = params.runconfig
    if runconfig.execution != Execution.RESIDENT:
        yield f"runconfig.execution {runconfig.execution} (--set runconfig.execution=resident)"
    if runconfig.device:
        yield f"runconfig.device {runconfig.device} (--set runconfig.device=null)"
