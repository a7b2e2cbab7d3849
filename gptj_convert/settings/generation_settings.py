"""generation_config.json, which says where a model's texts end: read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptj_convert.files.json_file import read_json
from gptj_convert.formats.layouts.hf import GENERATION_FILE
from gptj_model.config import CONFIG_FILE, GPTJConfig, as_tokens
from gptj_model.errors import ConfigError

MAX_BYTES = 2**20
MAX_MARKS = 2**17

#: Settings that decide which tokens transformers generates, except those that end a text.
_CHOICES = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff"),
    *("eta_cutoff", "num_beams", "num_return_sequences", "penalty_alpha", "length_penalty"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id"),
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "stop_strings"),
)


def generation_text(config: GPTJConfig) -> str:
    """Return a generation_config.json that says where the model's texts start and end."""
    fields = config.own_fields()
    ends = {name: fields[name] for name in ("bos_token_id", "eos_token_id")}
    return json.dumps(ends, indent=2) + "\n"


def stop_tokens(folder: Path, config: GPTJConfig) -> tuple[int, ...]:
    """Return the ids that each end a text, as transformers finds them.

    Args:
        folder: folder of the model; if it has a generation_config.json, only that counts.
        config: configuration of the model in the folder.

    Raises:
        FileFault: the file is not a JSON object.
        ConfigError: its eos_token_id is neither an id nor a list of ids.
    """
    values = _read(folder)
    if values is None:
        return config.stop_tokens
    ends = values.get("eos_token_id")
    each = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(type(i) is not int for i in each):
        raise ConfigError(
            f"{folder / GENERATION_FILE}: eos_token_id is {ends!r}, expected a token id, a list "
            "of them or null"
        )
    return as_tokens(each)


def unapplied(folder: Path, config: GPTJConfig) -> str | None:
    """Name the generation settings that transformers would apply and this program does not.

    Raises:
        FileFault: see `stop_tokens`.
    """
    values = _read(folder)
    name = CONFIG_FILE if values is None else GENERATION_FILE
    stated = config.carried if values is None else values
    found = [f"{key} {stated[key]!r}" for key in _CHOICES if stated.get(key) is not None]
    return f"{name} asks for {', '.join(found)}" if found else None


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / GENERATION_FILE
    if not path.is_file():
        return None
    return read_json(
        path, expected="settings of generation", max_bytes=MAX_BYTES, max_marks=MAX_MARKS
    )
