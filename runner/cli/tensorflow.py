"""TensorFlow made ready: imported quietly, as Keras' backend."""

from __future__ import annotations

import os
import sys
import tempfile


def prepare(*, deterministic: bool = True) -> None:
    """Import TensorFlow and Keras without their start-up chatter on stderr.

    The chatter is written by C++ code before its log level counts, hence the redirection.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if os.environ.get("GPTJ_DEBUG") == "1":
        import keras  # noqa: F401
    else:
        _import_quietly()
    if deterministic:
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


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
