"""A and B of a peft adapter, for a run that trains it further."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np

from gptj_convert.checkpoint.adapter_folder import open_adapter
from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.source import read_tensor
from runner.config.params import Params


def factors(folder: Path, config: GPTJConfig, params: Params) -> Mapping[str, np.ndarray]:
    """Return A and B of every layer in float32, by HF name and in HF's layout.

    Args:
        folder: folder of the adapter.
        config: configuration of the base model.
        params: parameters of the run, which must train an adapter of the same rank, scale and
            layers.

    Raises:
        ConfigError: the run trains another adapter, or none; see also `open_adapter`.
        FileFault, TensorFault: as `open_adapter` raises them.
    """
    with closing(open_adapter(folder, config)) as adapter:
        found = adapter.lora(config)
        wanted = params.model.lora and params.model.lora.lora
        if wanted is None or not found.equals(wanted):
            given = "leaves model.lora out" if wanted is None else f"has {wanted.in_words}"
            raise ConfigError(
                f"{folder}: is of {found.in_words}, and the YAML {given}",
                hint=f"train what it is: --set model.lora.rank={found.rank} --set "
                f"model.lora.alpha={found.alpha:g} --set "
                f"'model.lora.targets=[{', '.join(found.targets)}]'",
            )
        names = (name for update in adapter.updates.values() for name in (update.a, update.b))
        return {name: read_tensor(adapter.source, name).astype(np.float32) for name in names}


def without_base(folder: Path) -> ConfigError:
    """Return the error of a run that starts from an adapter without weights."""
    return ConfigError(
        f"{folder}: is an adapter, and no weights are named that it belongs to",
        hint="name its base with --init-from",
    )
