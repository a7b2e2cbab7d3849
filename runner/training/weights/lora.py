"""The adapter of a run with LoRA: enabled, saved and restored.

A checkpoint of such a run holds merged kernels under the names that every reader knows, and beside
them what the run needs to resume: the base kernels and the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptj_model.lora import Lora, adapter_rows
from gptj_model.network.model import GPTJ
from gptj_model.network.weights import enable_lora, first_a, variables
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import LORA_ALPHA, LORA_BASE, Scheme, Tensor
from runner.config.params import Params
from runner.config.trainable import trainable_rows
from runner.training.weights.initialize import initialization_seed
from runner.training.weights.lazy_array import LazyArray


def trained_weights(model: GPTJ, params: Params) -> tuple[Adapter | None, dict[Tensor, Any]]:
    """Return the adapter, which is enabled if the run has one, and the trained variables.

    Raises:
        ConfigError: as `trainable_rows` raises it.
    """
    rows = trainable_rows(model.config, params)
    found = variables(model)
    if params.model.lora is None:
        return None, {t: found[t.hf] for t in rows}
    lora = params.model.lora.lora
    added = enable_lora(model, lora, initialization_seed(params))
    adapter = Adapter(lora, {k: found[k.hf] for k in lora.rows(model.config)}, added)
    return adapter, {t: added[t] for t in rows}


class Adapter:
    """A LoRA beside its base kernels, which may be anything that numpy converts to an array.

    Args:
        lora: rank, alpha and layers.
        kernels: base kernels by their rows.
        variables: A and B by their rows.
    """

    def __init__(
        self, lora: Lora, kernels: Mapping[Tensor, Any], variables: Mapping[Tensor, Any]
    ) -> None:
        self._lora = lora
        self._alpha = np.asarray(lora.alpha, np.float32)
        self._kernels = kernels
        self._variables = variables

    def initialize(self, seed: int) -> None:
        """Draw A again and fill B with zeros, as `enable_lora` does."""
        for n, kernel in enumerate(self._kernels):
            a, b = adapter_rows(kernel, self._lora.rank)
            self._variables[a].assign(first_a(seed, n)(a.shape_in(Scheme.KERAS)))
            self._variables[b].assign(np.zeros(b.shape_in(Scheme.KERAS), np.float32))

    def tensors(self) -> dict[str, Any]:
        """Return merged kernels, and everything needed to resume, by TF name."""
        found: dict[str, Any] = {LORA_ALPHA: self._alpha}
        for kernel, base in self._kernels.items():
            a, b = adapter_rows(kernel, self._lora.rank)
            left, right = self._variables[a], self._variables[b]
            found[kernel.tf] = _merged(self._lora, base, left, right)
            found |= {base_name(kernel): base, a.tf: left, b.tf: right}
        return found

    def load(self, source: TensorSource) -> bool:
        """Load A and B from a checkpoint; return False if it has no such adapter, or only a part of
        it."""
        wanted = {row.tf: tuple(v.shape) for row, v in self._variables.items()}
        wanted |= {base_name(k): tuple(v.shape) for k, v in self._kernels.items()}
        found = source.tensors
        if LORA_ALPHA not in found or read_tensor(source, LORA_ALPHA) != self._alpha:
            return False
        if any(n not in found or found[n].shape != shape for n, shape in wanted.items()):
            return False
        for row, variable in self._variables.items():
            variable.assign(read_tensor(source, row.tf))
        return True

    def begin(self, values: Mapping[str, np.ndarray]) -> None:
        """Load A and B from elsewhere, by HF name and in HF's layout."""
        for row, variable in self._variables.items():
            variable.assign(row.op(Scheme.HF, Scheme.KERAS)(values[row.hf]))

    def load_kernels(self, source: TensorSource) -> None:
        """Load the base kernels, which are variables here."""
        for kernel, variable in self._kernels.items():
            variable.assign(read_tensor(source, base_name(kernel)))


def _merged(lora: Lora, base: Any, a: Any, b: Any) -> LazyArray:
    """Return a kernel with its update, computed when it is written."""
    return LazyArray(tuple(base.shape), lambda: lora.merged(*(np.asarray(v) for v in (base, a, b))))


def base_name(kernel: Tensor) -> str:
    """Return the name of a base kernel in a checkpoint."""
    return f"{kernel.tf}/{LORA_BASE}"
