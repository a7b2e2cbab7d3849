"""The weights that a run trains, as rows of the table or of an adapter."""

from __future__ import annotations

import re

from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.tensors import Tensor, table
from runner.config.params import Params


def model_rows(config: GPTJConfig, params: Params) -> list[Tensor]:
    """Return the rows of the table, and of the adapter if there is one."""
    lora = params.model.lora
    added = lora.lora.rows(config).values() if lora else ()
    return [*table(config), *(row for pair in added for row in pair)]


def trainable_rows(config: GPTJConfig, params: Params) -> list[Tensor]:
    """Return the rows of the adapter, or else of the table, without the frozen ones.

    Raises:
        ConfigError: a pattern of `model.frozen` matches no variable, or nothing is left to train.
    """
    section = params.model
    rows = table(config)
    if section.lora:
        rows = [row for pair in section.lora.lora.rows(config).values() for row in pair]
    known = [t.tf for t in (*table(config), *rows)]
    for pattern in section.frozen:
        if not any(re.search(pattern, name) for name in known):
            raise ConfigError(
                f"model.frozen: {pattern!r} matches no variable",
                hint=f"see `gptj inspect converted/` for the names, such as {rows[0].tf}",
            )
    left = [t for t in rows if not any(re.search(p, t.tf) for p in section.frozen)]
    if not left:
        raise ConfigError("model.frozen matches every variable, which leaves nothing to train")
    return left
