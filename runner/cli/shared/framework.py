"""Keras and the library that it computes with, imported quietly and set up."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

from gptj_model.errors import ConfigError
from runner.config.execution import Backend, default_backend
from runner.config.mesh import jax_devices
from runner.training.devices.chatter import without_chatter


def prepare(
    *,
    proving: bool = False,
    backend: str | None = None,
    joins_others: bool = False,
    bare: bool = True,
) -> None:
    """Import Keras and its backend without their start-up chatter on stderr.

    C++ code writes the chatter before its log level takes effect, hence the redirection.

    Args:
        proving: whether to multiply in full float32, which GPUs otherwise round to 10 bits (TF32);
            results may then differ from run to run.
        backend: one of `Backend`; None chooses as `default_backend` does.
        joins_others: whether this process will join others, before which JAX must not look for
            devices.
        bare: whether Keras is imported without its connections to libraries that no command uses,
            see `_CONNECTED`; a program that is not ours may use them.

    Raises:
        ConfigError: this process has imported Keras with another backend, or the backend is not
            installed or has no device.
    """
    backend = Backend(backend or default_backend())
    if not find_spec(backend):
        raise ConfigError(
            f"{backend} is not installed, expected it to compute with",
            hint=f"run `pip install 'gptj-tf[{_EXTRAS[backend]}]'`",
        )
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # On by default where the CPU has AVX512-VNNI: its allocator grows by doubling and returns
    # nothing, and XLA does not multiply with it.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with _hidden(_CONNECTED[backend] if bare else ()):
        if os.environ.get("GPTJ_DEBUG") == "1":
            _import(backend)
        else:
            sys.stderr.flush()
            with without_chatter(2):
                _import(backend)
    _check_backend(backend)
    _set_up(backend, proving)
    if backend == Backend.JAX and not joins_others:
        jax_devices()


_EXTRAS = {Backend.TENSORFLOW: "tf", Backend.JAX: "jax"}
#: Libraries that TensorFlow and Keras import if they are installed, to take their arrays or to be
#: called by them; that takes nearly as long as importing TensorFlow itself.
_CONNECTED = {
    Backend.TENSORFLOW: ("sklearn", "pandas", "jax"),
    Backend.JAX: ("sklearn", "pandas"),
}


@contextmanager
def _hidden(modules: Sequence[str]) -> Iterator[None]:
    """Import as if these modules were not installed, but for those that are imported already."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # pyright: ignore[reportArgumentType,reportCallIssue]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _set_up(backend: Backend, proving: bool) -> None:
    if backend == Backend.JAX:
        import jax

        if proving:
            jax.config.update("jax_default_matmul_precision", "highest")
        return
    import tensorflow as tf

    if proving:
        tf.config.experimental.enable_tensor_float_32_execution(False)
    else:
        tf.config.experimental.enable_op_determinism()


def _check_backend(backend: str) -> None:
    """Check that Keras runs on this backend, which is chosen once per process, when Keras is
    imported."""
    import keras

    if (found := keras.backend.backend()) != backend:
        raise ConfigError(
            f"Keras computes with {found} in this process, expected {backend}",
            hint="start gptj in a process of its own",
        )


def _import(backend: str) -> None:
    # PyTorch's CUDA build imports Triton, whose LLVM ends the process with a segmentation fault if
    # TensorFlow's is loaded before it (Triton 3.7.1 and TensorFlow 2.21, seen 2026-11-30).
    if backend == Backend.TENSORFLOW and find_spec("triton"):
        import_module("triton")
    collects = gc.isenabled()
    gc.disable()  # there is no garbage, and looking for it takes a quarter of the time
    try:
        import_module(backend)
        import_module("keras")
    finally:
        if collects:
            gc.enable()
