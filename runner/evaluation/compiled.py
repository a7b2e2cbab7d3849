"""Compiled programs as text, and the empty batches that they are compiled for.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from runner.data.reading.input_fn import Batch


def program_text(function: Any, *arguments: tf.Tensor) -> str:
    """What a compiled function becomes for such arguments; nothing is run."""
    tf.random.set_seed(0)  # TensorFlow draws a random number here, to see where that is done
    return function.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")


def empty_batch(batch_size: int, length: int) -> Batch:
    """A batch of the right shapes."""
    shape = (batch_size, length)
    return tf.zeros(shape, tf.int32), tf.zeros(shape), tf.zeros(shape, tf.int32)
