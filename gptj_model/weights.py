"""Weights of a Keras GPT-J, by the table: put there from any source, and found by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptj_model.dtypes import NUMPY
from gptj_model.model import GPTJ
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import Scheme, Tensor, table


def variables(model: GPTJ) -> dict[str, Any]:
    """The model's weights by HF name, in the table's order."""
    return assigned_variables(model, {t.hf: t for t in table(model.config)}, prefix=model.name)


def assigned_variables(layer: Any, tensors: Mapping[str, Tensor], *, prefix: str) -> dict[str, Any]:
    """The variables of a layer by HF name; its paths must be those of the table, below `prefix`.

    Raises:
        KeyError: a variable has no row, or a row no variable.
    """
    by_path = {v.path.removeprefix(f"{prefix}/"): v for v in layer.trainable_variables}
    found = {t.hf: by_path.pop(t.keras) for t in tensors.values()}
    if by_path:
        raise KeyError(f"variables without a row in the table: {sorted(by_path)}")
    return found


def load_weights(model: GPTJ, source: TensorSource, scheme: Scheme) -> None:
    """Assign every weight from a source whose names follow `scheme`, cast to the model's dtype.

    Raises:
        KeyError: the source lacks a tensor (a plan would have said so before).
    """
    found = variables(model)
    for tensor in table(model.config):
        assign(found[tensor.hf], tensor, source, scheme)


def assign(variable: Any, tensor: Tensor, source: TensorSource, scheme: Scheme) -> None:
    """Give one variable its values from a source, in Keras' layout."""
    values = read_tensor(source, tensor.name(scheme))
    values = tensor.op(scheme, Scheme.KERAS)(values)
    variable.assign(values.astype(NUMPY[variable.dtype], copy=False))
