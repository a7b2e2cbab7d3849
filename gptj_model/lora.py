"""LoRA adapters: their names in each format, and how they are merged.

A kernel W (inputs × outputs) is applied as W + alpha / rank · A · B, where only A (inputs × rank)
and B (rank × outputs) are trained. This module needs numpy and the table only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptj_model.config import GPTJConfig
from gptj_model.op import Op
from gptj_model.tensors import KERNELS, LORA_A, LORA_B, Role, Tensor, table

#: Prefix that the peft library puts before the names of an adapted model.
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Which dense layers are adapted, and by how much."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of adapted layers, from `DENSE_LAYERS`."""

    @property
    def scale(self) -> float:
        """Factor of A · B."""
        return self.alpha / self.rank

    @property
    def in_words(self) -> str:
        """Description of the adapter for people."""
        return f"rank {self.rank}, alpha {self.alpha:g}, for {', '.join(self.targets)}"

    def equals(self, other: Lora) -> bool:
        """Return whether both adapt the same layers equally; alpha may have been rounded."""
        return (
            self.rank == other.rank
            and set(self.targets) == set(other.targets)
            and math.isclose(self.alpha, other.alpha, rel_tol=1e-6)
        )

    def rows(self, config: GPTJConfig) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Return the rows of A and B by the row of the kernel that they adapt, in the table's
        order."""
        return {
            t: adapter_rows(t, self.rank) for t in table(config) if target_of(t) in self.targets
        }

    def merged(self, kernel: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the kernel with its update, float32, in Keras' layout (inputs, outputs)."""
        return kernel + np.float32(self.scale) * (a @ b)


def target_of(tensor: Tensor) -> str | None:
    """Return the dense layer that a tensor is the kernel of; None if it is none."""
    return tensor.layer if tensor.role in KERNELS else None


def adapter_rows(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of a kernel as rows like the table's; their HF names are those of peft."""
    outputs, inputs = kernel.shape
    layer, folder = kernel.hf.removesuffix("weight"), kernel.keras.removesuffix("kernel")

    def row(letter: str, tf: str, shape: tuple[int, int]) -> Tensor:
        return Tensor(
            layer=kernel.layer,
            role=Role.ADAPTER,
            hf=f"{PEFT_PREFIX}{layer}lora_{letter}.weight",
            tf=f"{kernel.tf}/{tf}",
            keras=f"{folder}lora_kernel_{letter.lower()}",
            cs=(),
            shape=shape,
            tf_op=Op.TRANSPOSE,
            block=kernel.block,
        )

    return row("A", LORA_A, (rank, inputs)), row("B", LORA_B, (outputs, rank))


def peft_config(lora: Lora, base: str | None) -> dict[str, Any]:
    """Return the content of the adapter_config.json that peft loads.

    Args:
        lora: the adapter.
        base: folder or repository of the base model; None if it is not known.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        # peft declares the field as a whole number.
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def stored_lora(config: GPTJConfig, shapes: Mapping[str, Sequence[int]], alpha: float) -> Lora:
    """Return the LoRA that a checkpoint's tensors belong to.

    Args:
        config: configuration of the model.
        shapes: shape of every tensor, by TF name.
        alpha: alpha as the checkpoint stores it.
    """
    found = {t: f"{t.tf}/{LORA_A}" for t in table(config) if f"{t.tf}/{LORA_A}" in shapes}
    targets = dict.fromkeys(target_of(t) for t in found)
    return Lora(
        rank=shapes[next(iter(found.values()))][1],
        alpha=alpha,
        targets=tuple(name for name in targets if name),
    )
