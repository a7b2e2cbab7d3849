"""Weights of a Keras GPT-J, by the table: loaded from any source, and found by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from gptj_model.dtypes import NUMPY
from gptj_model.lora import Lora
from gptj_model.network.model import GPTJ
from gptj_model.op import Op
from gptj_model.source import TensorSource, read_rows, read_tensor
from gptj_model.tensors import Scheme, Tensor, table

#: Prefix of the variables that Keras' `enable_lora` adds to a layer.
ADAPTER = "lora_kernel_"


def variables(model: GPTJ) -> dict[str, Any]:
    """Return the model's weights by HF name, in the table's order."""
    return assigned_variables(model, {t.hf: t for t in table(model.config)}, prefix=model.name)


def assigned_variables(layer: Any, tensors: Mapping[str, Tensor], *, prefix: str) -> dict[str, Any]:
    """Return the variables of a layer by HF name; their paths below `prefix` must be those of the
    table.

    Raises:
        KeyError: a variable has no row, or a row has no variable.
    """
    own = (v for v in layer.weights if not v.name.startswith(ADAPTER))
    by_path = {v.path.removeprefix(f"{prefix}/"): v for v in own}
    found = {t.hf: by_path.pop(t.keras) for t in tensors.values()}
    if by_path:
        raise KeyError(f"variables without a row in the table: {sorted(by_path)}")
    return found


def enable_lora(model: GPTJ, lora: Lora, seed: int) -> dict[Tensor, Any]:
    """Add an adapter to the model's dense layers, with random A and zero B, so that nothing changes
    yet.

    Args:
        model: model without an adapter.
        lora: adapted layers, rank and alpha.
        seed: seed of A; every layer gets a different A.

    Returns:
        The variables of A and B by their rows, in the table's order.
    """
    found: dict[Tensor, Any] = {}
    for n, (kernel, (a, b)) in enumerate(lora.rows(model.config).items()):
        assert kernel.block is not None, "only layers of blocks are adapted"
        layer = adapted_layer(model.blocks[kernel.block], kernel)
        layer.enable_lora(lora.rank, lora.alpha, a_initializer=first_a(seed, n))
        found |= {a: layer.lora_kernel_a, b: layer.lora_kernel_b}
    return found


def adapted_layer(block: Any, kernel: Tensor) -> Any:
    """Return the dense layer of a block that owns this kernel."""
    *_, part, layer_name, _ = kernel.hf.split(".")
    return getattr(getattr(block, part), layer_name)


def first_a(seed: int, n: int) -> keras.Initializer:
    """Return the initializer of A of the n-th adapted kernel."""
    return keras.initializers.HeUniform(seed=(seed * 10_007 + n) % 2**31)


def load_weights(model: GPTJ, source: TensorSource, scheme: Scheme) -> None:
    """Assign every weight from a source whose names follow `scheme`, cast to the model's dtype.

    Raises:
        KeyError: the source lacks a tensor, which a plan would have found.
    """
    found = variables(model)
    for tensor in table(model.config):
        assign(found[tensor.hf], tensor, source, scheme)


def forget(weights: Iterable[Any]) -> None:
    """Make variables NaN, so that one that is not loaded afterwards does not go unnoticed."""
    for variable in weights:
        variable.assign(np.full(variable.shape, np.nan, np.float32))


def assign(variable: Any, tensor: Tensor, source: TensorSource, scheme: Scheme) -> None:
    """Assign one variable from a source, in Keras' layout."""
    variable.assign(read_values(tensor, source, scheme, variable.dtype))


def read_part(
    tensor: Tensor, source: TensorSource, scheme: Scheme, index: tuple[slice, ...]
) -> np.ndarray:
    """Return a part of a tensor of a source in Keras' layout, in the source's dtype.

    Only its bytes are read where they follow one another in the source.

    Args:
        tensor: row of the table.
        source: checkpoint.
        scheme: naming scheme and layout of the source.
        index: part along each axis of Keras' layout.
    """
    op = tensor.op(scheme, Scheme.KERAS)
    rows, *others = index[::-1] if op is Op.TRANSPOSE else index
    found = read_rows(source, tensor.name(scheme), rows.start or 0, rows.stop)
    return op(found[(slice(None), *others)])


def read_values(tensor: Tensor, source: TensorSource, scheme: Scheme, dtype: str) -> np.ndarray:
    """Return a tensor of a source in Keras' layout and this dtype, contiguous."""
    values = read_tensor(source, tensor.name(scheme))
    return np.ascontiguousarray(tensor.op(scheme, Scheme.KERAS)(values), NUMPY[dtype])
