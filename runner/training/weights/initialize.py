"""Random weights, as the YAML's initializers say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from gptj_model.config import GPTJConfig
from gptj_model.tensors import Role, Scheme, Tensor, table
from runner.config.params import Initializer, Params

#: The reference's initializers where the YAML names none.
_DEFAULTS = {
    "embedding_initializer": Initializer(name="scaled_init_normal", key="vocab_size"),
    "initializer": Initializer(name="variance_scaling", scale=1.0),
    "output_layer_initializer": Initializer(name="variance_scaling", scale_type="wang_init"),
}


def initialize(found: Mapping[str, Any], config: GPTJConfig, params: Params) -> None:
    """Initialize every weight; `found` are the variables by HF name."""
    for tensor, values in first_values(config, params):
        found[tensor.hf].assign(values)


def first_values(config: GPTJConfig, params: Params) -> Iterator[tuple[Tensor, Any]]:
    """Yield matrices by their initializer, gains of 1 and biases of 0; float32, in Keras' layout.

    The values are a function of the seed and of the tensor's place in the table.
    """
    seed = initialization_seed(params)
    for n, tensor in enumerate(table(config)):
        shape = tensor.shape_in(Scheme.KERAS)
        if len(shape) == 1:
            gain = tensor.role is Role.GAIN
            yield tensor, keras.ops.full(shape, 1.0 if gain else 0.0, "float32")
            continue
        values = _initializer(_spec(tensor, params), params, (seed * 10_007 + n) % 2**31)
        yield tensor, values(shape)


def initialization_seed(params: Params) -> int:
    """Return the seed of everything that starts at random."""
    seed = params.model.weight_initialization_seed
    return (params.runconfig.tf_random_seed or 0) if seed is None else seed


def _spec(tensor: Tensor, params: Params) -> Initializer:
    key = "initializer"
    if tensor.role is Role.EMBEDDING:
        key = "embedding_initializer"
    elif tensor.role is Role.RESIDUAL:
        key = "output_layer_initializer"
    named = getattr(params.model, key)
    return named[0] if named else _DEFAULTS[key]


def _initializer(spec: Initializer, params: Params, seed: int) -> keras.Initializer:
    layers = params.model.num_hidden_layers
    if spec.name == "variance_scaling":
        scale = spec.scale
        if scale is None:
            scale = 4 / layers**2 if spec.scale_type == "wang_init" else 2 / 5
        # As Keras reads the names, so that a YAML of the reference means the same here.
        kind = {"normal": "truncated_normal"}.get(spec.distribution, spec.distribution)
        return keras.initializers.VarianceScaling(scale, spec.mode, kind, seed)
    deviation = spec.stddev
    truncated = spec.name == "truncated_normal"
    if spec.name == "scaled_init_normal":
        vocabulary = params.config.vocab_size
        parts = {None: 1, "vocab_size": vocabulary, "num_hidden_layers": 2 * layers}[spec.key]
        deviation = spec.sigma / math.sqrt(parts)
        truncated = spec.distribution != "untruncated_normal"
    if truncated:
        return keras.initializers.TruncatedNormal(spec.mean, deviation, seed)
    return keras.initializers.RandomNormal(spec.mean, deviation, seed)
