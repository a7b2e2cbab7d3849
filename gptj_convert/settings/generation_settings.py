"""generation_config.json: where a model's texts end and how it continues prompts by default."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.files.json_file import read_json
from gptj_convert.formats.layouts.hf import GENERATION_FILE
from gptj_model.config import CONFIG_FILE, GPTJConfig, as_tokens
from gptj_model.errors import ConfigError

MAX_BYTES = 2**20
MAX_MARKS = 2**17


def _is_count(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


#: What `gptj generate` applies: each field's test, and what passes it in words.
_APPLIED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda v: type(v) is bool, "true or false"),
    "temperature": (lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
    "top_k": (_is_count(0), "a whole number of at least 0"),
    "top_p": (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda v: _is_number(v) and v > 0, "a number above 0"),
    "no_repeat_ngram_size": (_is_count(0), "a whole number of at least 0"),
    "max_new_tokens": (_is_count(1), "a whole number of at least 1"),
    "max_length": (_is_count(1), "a whole number of at least 1"),
    "min_new_tokens": (_is_count(0), "a whole number of at least 0"),
    "min_length": (_is_count(0), "a whole number of at least 0"),
    "num_beams": (_is_count(1), "a whole number of at least 1"),
    "length_penalty": (_is_number, "a number"),
    "early_stopping": (lambda v: type(v) is bool or v == "never", 'true, false or "never"'),
    "num_return_sequences": (_is_count(1), "a whole number of at least 1"),
    "stop_strings": (
        lambda v: _is_text(v) or (isinstance(v, list) and v != [] and all(map(_is_text, v))),
        "a text or a list of texts, none of them empty",
    ),
}

#: What transformers applies and this program does not, with the value that changes nothing.
_UNAPPLIED: dict[str, Any] = {
    **dict.fromkeys(("min_p", "top_h", "penalty_alpha", "bad_words_ids", "force_words_ids")),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "constraints")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "max_time", "guidance_scale")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config", "dola_layers")),
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "remove_invalid_values": False,
    "token_healing": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """What a model's folder says of how prompts are continued."""

    file: Path
    """File that the values are from."""
    values: Mapping[str, Any]
    """Fields that `gptj generate` applies, under transformers' names; those that say nothing are
    left out."""
    unapplied: Mapping[str, Any]
    """Fields that transformers applies and `gptj generate` does not."""


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


def generation_defaults(folder: Path, config: GPTJConfig) -> GenerationDefaults:
    """Return how prompts are continued by default, as transformers finds it.

    Args:
        folder: folder of the model; if it has a generation_config.json, only that counts.
        config: configuration of the model in the folder, whose other fields count otherwise.

    Raises:
        FileFault: the file is not a JSON object.
        ConfigError: a field has a value that it cannot have.
    """
    values = _read(folder)
    file = folder / (CONFIG_FILE if values is None else GENERATION_FILE)
    every = config.carried if values is None else values
    stated = {name: value for name, value in every.items() if value is not None}
    for name, (fits, words) in _APPLIED.items():
        if name in stated and not fits(stated[name]):
            raise ConfigError(f"{file}: {name} is {stated[name]!r}, expected {words}")
    return GenerationDefaults(
        file=file,
        values={name: stated[name] for name in _APPLIED if name in stated},
        unapplied={
            name: stated[name]
            for name, neutral in _UNAPPLIED.items()
            if stated.get(name, neutral) != neutral
        },
    )


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / GENERATION_FILE
    if not path.is_file():
        return None
    return read_json(
        path, expected="settings of generation", max_bytes=MAX_BYTES, max_marks=MAX_MARKS
    )
