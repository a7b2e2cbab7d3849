"""The adapter of a run with LoRA: enabled, saved and restored.

A checkpoint of such a run holds merged kernels under the names that every reader knows, and beside
them what the run needs to go on: the kernels it began with, and the adapter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptj_model.adapter import Lora
from gptj_model.model import GPTJ
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import LORA_ALPHA, LORA_BASE, Tensor
from gptj_model.weights import enable_lora, variables
from runner.initialize import initialization_seed
from runner.params import Params
from runner.trained import trained_rows


def trained_weights(model: GPTJ, params: Params) -> tuple[Adapter | None, dict[Tensor, Any]]:
    """The adapter, which is enabled if there is to be one, and the variables that are trained.

    Raises:
        ConfigError: see `trained_rows`.
    """
    rows = trained_rows(model.config, params)
    lora = params.model.lora
    if lora is None:
        found = variables(model)
        return None, {t: found[t.hf] for t in rows}
    adapter = Adapter(model, lora.lora, params)
    return adapter, {t: adapter.variables[t] for t in rows}


class Adapter:
    """The LoRA of a model, which it enables.

    Args:
        model: without one so far.
        lora: which layers, and how.
        params: of the run, for the seed.
    """

    def __init__(self, model: GPTJ, lora: Lora, params: Params) -> None:
        self._model = model
        self._lora = lora
        self._alpha = np.asarray(lora.alpha, np.float32)
        self._rows = lora.rows(model.config)
        self.variables = enable_lora(model, lora, initialization_seed(params))
        """A and B by their rows."""

    def tensors(self) -> dict[str, Any]:
        """Merged kernels and all that is needed to go on, by TF name."""
        kernels = variables(self._model)
        found: dict[str, Any] = {LORA_ALPHA: self._alpha}
        for kernel, (a, b) in self._rows.items():
            base, left, right = kernels[kernel.hf], self.variables[a], self.variables[b]
            found[kernel.tf] = _Merged(self._lora, base, left, right)
            found |= {_base_name(kernel): base, a.tf: left, b.tf: right}
        return found

    def load(self, source: TensorSource) -> bool:
        """Take base kernels and adapter from a checkpoint; False if it has no such adapter."""
        kernels = variables(self._model)
        wanted = self.variables | {k: kernels[k.hf] for k in self._rows}
        names = {row: row.tf for row in self.variables} | {k: _base_name(k) for k in self._rows}
        found = source.tensors
        if LORA_ALPHA not in found or read_tensor(source, LORA_ALPHA) != self._alpha:
            return False
        if any(
            names[row] not in found or found[names[row]].shape != tuple(variable.shape)
            for row, variable in wanted.items()
        ):
            return False
        for row, variable in wanted.items():
            variable.assign(read_tensor(source, names[row]))
        return True


class _Merged:
    """A kernel with its update, made when it is written and not kept."""

    dtype = "float32"

    def __init__(self, lora: Lora, base: Any, a: Any, b: Any) -> None:
        self.shape = tuple(base.shape)
        self._merge = lambda: lora.merged(*(np.asarray(v) for v in (base, a, b)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._merge()


def _base_name(kernel: Tensor) -> str:
    return f"{kernel.tf}/{LORA_BASE}"
