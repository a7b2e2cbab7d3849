"""Arrays handed to TensorFlow without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

#: What compiled programs expect of an address.
_ALIGNMENT = 64


def shared_tensor(values: np.ndarray) -> Any:
    """A tensor with the memory of an array, or with a copy of it where that cannot be shared.

    It changes with the array: whoever fills that anew has seen to it that nothing computes with
    the tensor.
    """
    if values.ctypes.data % _ALIGNMENT or not (
        values.flags.c_contiguous and values.flags.writeable
    ):
        return tf.convert_to_tensor(values)
    return tf.experimental.dlpack.from_dlpack(values.__dlpack__())
