"""Arrays passed to TensorFlow without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

#: Alignment that compiled programs expect, in bytes.
_ALIGNMENT = 64


def shared_tensor(values: np.ndarray) -> Any:
    """Return a tensor that shares the memory of an array, or a copy where it cannot be shared.

    The tensor changes with the array: nothing may compute with it once the array is refilled.
    """
    if values.ctypes.data % _ALIGNMENT or not (
        values.flags.c_contiguous and values.flags.writeable
    ):
        return tf.convert_to_tensor(values)
    return tf.experimental.dlpack.from_dlpack(values.__dlpack__())
