"""Optimizer state in a checkpoint of any format. TensorFlow's checkpoints hold it beside the
weights, by name; a `.mdl` holds it in its tree, by number; beside Hugging Face's weights PyTorch's
optimizer.pt holds it."""

from __future__ import annotations

from collections.abc import Iterator

from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.formats.layouts.torch_optimizer import OPTIMIZER_FILE
from gptj_convert.optimizer.from_cs import from_cs
from gptj_convert.optimizer.from_tf import from_tf
from gptj_convert.optimizer.from_torch import from_torch
from gptj_convert.optimizer.state import DTYPE, WITHOUT, OptimizerState, refuse
from gptj_model.dtypes import FLOATS, is_lossless
from gptj_model.errors import FileFault
from gptj_model.optimizer_names import ADAMS, MOMENTS, STATE
from gptj_model.tensors import SLOTS, Scheme, table


def read_state(checkpoint: Checkpoint) -> OptimizerState:
    """Return the state in a checkpoint that was opened with its optimizer.

    Raises:
        FileFault: there is no state.
        TensorFault: the state belongs to another optimizer, or is incomplete; all that is missing
            is named.
    """
    state = find_state(checkpoint)
    if state is None:
        raise FileFault(
            f"{checkpoint.path}: holds no optimizer state, expected {_expected(checkpoint.scheme)}",
            hint=WITHOUT,
        )
    return state


def find_state(checkpoint: Checkpoint) -> OptimizerState | None:
    """Return the state in a checkpoint, or None where there is none; see `read_state`."""
    if checkpoint.scheme is Scheme.TF:
        state = from_tf(checkpoint)
    elif checkpoint.scheme is Scheme.CS:
        state = from_cs(checkpoint)
    elif checkpoint.optimizer:
        state = from_torch(checkpoint, checkpoint.optimizer)
    else:
        return None
    if state:
        refuse(checkpoint, _faulty_moments(checkpoint, state))
    return state


def _expected(scheme: Scheme) -> str:
    match scheme:
        case Scheme.TF:
            first, second = SLOTS[ADAMS[0]]
            return (
                f"slots …/{first} and …/{second} beside every weight, as a run's checkpoints have"
            )
        case Scheme.CS:
            return f"{STATE}0.{MOMENTS[0]} and so on, as the client's checkpoints have"
        case Scheme.HF:
            return f"{OPTIMIZER_FILE} beside the weights"
        case Scheme.KERAS:
            return "another format: a Keras weights file has no place for it"


def _faulty_moments(checkpoint: Checkpoint, state: OptimizerState) -> Iterator[str]:
    tensors, scheme = checkpoint.everything.tensors, checkpoint.scheme
    for tensor in table(checkpoint.config):
        for name in state.moments[tensor.hf]:
            info, shape = tensors.get(name), tensor.shape_in(scheme)
            if info is None:
                yield f"{name!r}, a moment of {tensor.name(scheme)!r}, is missing"
            elif info.shape != shape:
                yield (
                    f"{name!r} has shape {list(info.shape)}, expected {list(shape)}, that of "
                    f"{tensor.name(scheme)!r}"
                )
            elif info.dtype not in FLOATS or not is_lossless(info.dtype, DTYPE):
                yield f"{name!r} holds {info.dtype}, expected {DTYPE}"
