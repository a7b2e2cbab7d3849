"""Optimizer state of any checkpoint as a source of TensorFlow's tensors."""

from __future__ import annotations

import numpy as np

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.optimizer.state import DTYPE, OptimizerState
from gptj_model.op import Op
from gptj_model.optimizer_names import ADAMS, named_moments
from gptj_model.source import TensorInfo, raw_bytes, read_tensor
from gptj_model.tensors import Scheme, table


class StateInTf:
    """Optimizer state of any checkpoint under the names and in the layout of TensorFlow's.

    A `TensorSource` of slots and scalars to start a run from: a moment is read whole, and kept
    until another is asked for.

    Args:
        checkpoint: open checkpoint with its optimizer state.
        state: state found in it.
        optimizer_type: optimizer of the run; unless it is one of `ADAMS`, there are no slots for
            it.
    """

    def __init__(self, checkpoint: Checkpoint, state: OptimizerState, optimizer_type: str) -> None:
        self._source = checkpoint.everything
        self._scalars = state.scalars
        self._moments: dict[str, tuple[str, Op]] = {}
        self._last: tuple[str, np.ndarray] | None = None
        self.tensors = {n: TensorInfo(v.dtype.name, v.shape) for n, v in self._scalars.items()}
        if optimizer_type not in ADAMS:
            return
        names = named_moments(checkpoint.config, optimizer_type)
        for tensor in table(checkpoint.config):
            op = tensor.op(checkpoint.scheme, Scheme.TF)
            pairs = zip(names[tensor.hf], state.moments[tensor.hf], strict=True)
            self._moments |= {name: (stored, op) for name, stored in pairs}
            info = TensorInfo(DTYPE, tensor.shape_in(Scheme.TF))
            self.tensors |= dict.fromkeys(names[tensor.hf], info)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Implement `TensorSource`."""
        values = self._scalars[name] if name in self._scalars else self._moment(name)
        buffer[:] = raw_bytes(values)[offset : offset + len(buffer)]

    def _moment(self, name: str) -> np.ndarray:
        if self._last is None or self._last[0] != name:
            stored, op = self._moments[name]
            self._last = None  # never two of them at once
            values = np.ascontiguousarray(op(read_tensor(self._source, stored)), DTYPE)
            self._last = name, values
        return self._last[1]

    def close(self) -> None:
        """Do nothing: whoever opened the checkpoint closes it."""
