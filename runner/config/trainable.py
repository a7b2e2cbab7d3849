"""Which weights a run trains: rows of the table or of an adapter, by its parameters alone."""

from __future__ import annotations

import re

from gptj_model.config import GPTJConfig
from gptj_model.errors import ConfigError
from gptj_model.tensors import Tensor, table
from runner.config.params import Params


def trained_rows(config: GPTJConfig, params: Params) -> list[Tensor]:
    """Rows of what is trained, the adapter's or the table's, less what is frozen.

    Raises:
        ConfigError: a pattern of `model.frozen` has no variable, or they leave none.
    """
    section = params.model
    rows = table(config)
    if section.lora:
        rows = [row for pair in section.lora.lora.rows(config).values() for row in pair]
    known = [t.tf for t in (*table(config), *rows)]
    for pattern in section.frozen:
        if not any(re.search(pattern, name) for name in known):
            raise ConfigError(
                f"model.frozen: no variable's name has {pattern!r}",
                hint=f"names are those that `gptj inspect converted/` lists, such as {rows[0].tf}",
            )
    left = [t for t in rows if not any(re.search(p, t.tf) for p in section.frozen)]
    if not left:
        raise ConfigError("model.frozen leaves nothing to train")
    return left
