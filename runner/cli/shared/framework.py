"""TensorFlow and Keras, imported quietly and set up as Keras' backend, or beside JAX for the
data."""

from __future__ import annotations

import os
import sys
import tempfile


def prepare(*, proving: bool = False, backend: str = "tensorflow") -> None:
    """Import TensorFlow and Keras without their start-up chatter on stderr.

    C++ code writes the chatter before its log level takes effect, hence the redirection.

    Args:
        proving: whether to multiply in full float32, which GPUs otherwise round to 10 bits (TF32);
            results may then differ from run to run.
        backend: backend of Keras; beside another one, TensorFlow uses no GPU.

    Raises:
        ConfigError: this process has imported Keras with another backend.
    """
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # On by default where the CPU has AVX512-VNNI: its allocator grows by doubling and returns
    # nothing, and XLA does not multiply with it.
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
    """Check that Keras runs on this backend, which is chosen once per process, when Keras is
    imported."""
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
