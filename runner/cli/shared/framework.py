"""TensorFlow made ready: imported quietly, as Keras' backend, or beside JAX for the data."""

from __future__ import annotations

import os
import sys
import tempfile


def prepare(*, proving: bool = False, backend: str = "tensorflow") -> None:
    """Import TensorFlow and Keras without their start-up chatter on stderr.

    The chatter is written by C++ code before its log level counts, hence the redirection.

    Args:
        proving: products in all of float32, which GPUs round to 10 bits (TF32) otherwise; but not
            the same numbers at every run, which costs time.
        backend: of Keras; beside another one, TensorFlow leaves the GPUs alone.

    Raises:
        ConfigError: this process has imported Keras with another backend.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # On by itself where the processor has AVX512-VNNI: its allocator grows by doubling and gives
    # nothing back, and it is not what XLA multiplies with.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    if os.environ.get("GPTJ_DEBUG") == "1":
        import keras  # noqa: F401
    else:
        _import_quietly()
    _check_backend(backend)
    import tensorflow as tf

    if proving:
        tf.config.experimental.enable_tensor_float_32_execution(False)
    else:
        tf.config.experimental.enable_op_determinism()
    if backend != "tensorflow":
        tf.config.set_visible_devices([], "GPU")


def _check_backend(backend: str) -> None:
    """See that Keras runs on it: it is chosen once a process, when Keras is imported."""
    import keras

    from gptj_model.errors import ConfigError

    if (found := keras.backend.backend()) != backend:
        raise ConfigError(
            f"Keras computes with {found} in this process, expected {backend}",
            hint="start gptj in a process of its own",
        )


def _import_quietly() -> None:
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            import keras  # noqa: F401
            import tensorflow  # noqa: F401
        finally:
            os.dup2(kept, 2)
            os.close(kept)
