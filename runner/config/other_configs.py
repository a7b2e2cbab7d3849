"""Configurations of other programs, told apart by keys that only they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What a configuration is, keys that tell, and what to do with it. One key is enough.
_PROGRAMS: tuple[tuple[str, frozenset[str], str], ...] = (
    (
        "the CS client (cszoo)",
        frozenset({"trainer"}),
        "convert the model that it belongs to: `gptj convert MODEL.mdl --config FILE --to tf` "
        "writes a params.yaml",
    ),
    (
        "GPT-NeoX or Megatron",
        frozenset({
            "pipe_parallel_size", "model_parallel_size", "train_micro_batch_size_per_gpu",
            "num_layers", "micro_batch_size", "tensor_model_parallel_size",
        }),
        "",
    ),
    ("the original JAX trainer of GPT-J", frozenset({"tpu_size", "d_model"}), ""),
    (
        "a program on transformers' Trainer",
        frozenset({"per_device_train_batch_size", "base_model", "model_name_or_path"}),
        "",
    ),
    ("DeepSpeed", frozenset({"zero_optimization", "train_batch_size"}), ""),
    ("accelerate", frozenset({"distributed_type", "compute_environment"}), ""),
)  # fmt: skip
#: Values that the sections of the CS client's older PyTorch programs have, by section and key.
_CS_PYTORCH = {
    ("train_input", "data_processor"): "HDF5",
    ("model", "model_name"): "",
    ("model", "position_embedding_type"): "",
    ("model", "fp16_type"): "",
    ("runconfig", "compile_dir"): "",
}
_HINT = "start from the params.yaml that `gptj convert --to tf` writes, or from configs/"


def other_program(values: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return whose configuration the parsed YAML is, and what to do next, or None.

    Args:
        values: content of a file that should have the sections of a params.yaml.
    """
    keys = {str(key).replace("-", "_") for key in values}
    if "train_input" not in keys or "model" not in keys:
        for program, telling, hint in _PROGRAMS:
            if keys & telling:
                return program, hint or _HINT
    for (section, key), part in _CS_PYTORCH.items():
        found = values.get(section)
        if isinstance(found, Mapping) and part in str(found.get(key, "\0")) and key in found:
            return "the CS PyTorch client", _HINT
    return None
