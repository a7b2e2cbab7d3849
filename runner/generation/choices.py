"""The options of a generation: those of the command line, else those of the model's folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gptj_convert.settings.generation_settings import GenerationDefaults
from gptj_model.decoding.options import GenerationOptions
from gptj_model.errors import ConfigError, UsageError

#: Fields that need sampling, and fields that need beams.
_OF_SAMPLING = ("temperature", "top_k", "top_p")
_OF_BEAMS = ("length_penalty", "early_stopping")
#: Default of each option.
_PLAIN = {f.name: f.default for f in fields(GenerationOptions)} | {
    "do_sample": False,
    "temperature": 1.0,
    "min_new_tokens": 0,
    "stop_strings": (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """How prompts are continued, and who says so."""

    options: GenerationOptions
    """Options of generation."""
    stop_strings: tuple[str, ...]
    """Texts that each end a continuation."""
    taken: Mapping[str, Any]
    """Fields of the model's folder that have an effect."""


def choose_options(asked: Mapping[str, Any], defaults: GenerationDefaults, seed: int) -> Choices:
    """Return the options of a generation.

    Args:
        asked: options of the command line under transformers' names; None and () say nothing.
        defaults: what the model's folder says.
        seed: seed of the first continuation.

    Raises:
        UsageError: an option has no effect beside the others, or cannot go with them.
        ConfigError: the model's folder asks for sampling at temperature 0.
    """
    given = {name: value for name, value in asked.items() if value not in (None, ())}
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{_option(name)} is {value}, expected a number")
    stated = dict(defaults.values)
    if "temperature" in given:
        stated.pop("do_sample", None)
    for name, rival in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if name in given or name in stated:
            stated.pop(rival, None)
    values = stated | given
    samples = given["temperature"] > 0 if "temperature" in given else stated.get("do_sample", False)
    if samples and not values.get("temperature", 1):
        raise ConfigError(
            f"{defaults.file}: do_sample is true and temperature is 0, expected one above 0",
            hint="--temperature wins over the file: 0 takes the most likely token",
        )
    beams = values.get("num_beams", 1) > 1
    idle = {*(() if samples else _OF_SAMPLING), *(() if beams else _OF_BEAMS)}
    _refuse_idle(given, idle)
    known = {f.name for f in fields(GenerationOptions)}
    chosen = {k: v for k, v in values.items() if k in known and k not in idle}
    chosen["temperature"] = values.get("temperature", 1.0) if samples else 0.0
    if "max_length" in chosen:
        chosen["max_new_tokens"] = None
    options = GenerationOptions(**chosen, seed=seed)
    _check(options, given, defaults)
    stops = values.get("stop_strings", ())
    return Choices(
        options=options,
        stop_strings=(stops,) if isinstance(stops, str) else tuple(stops),
        taken={
            name: value
            for name, value in stated.items()
            if name not in given and name not in idle and value != _PLAIN[name]
        },
    )


def in_words(values: Mapping[str, Any]) -> str:
    """Return fields of a JSON file with their values, for notes."""
    return ", ".join(f"{k} {json.dumps(v, ensure_ascii=False)}" for k, v in values.items())


def _refuse_idle(given: Mapping[str, Any], idle: set[str]) -> None:
    for name in given:
        if name in idle and name != "temperature":
            needed = "--num-beams above 1" if name in _OF_BEAMS else "--temperature above 0"
            raise UsageError(
                f"{_option(name)} has no effect without {needed}",
                hint=f"give {needed} as well, or leave out {_option(name)}",
            )


def _check(
    options: GenerationOptions, given: Mapping[str, Any], defaults: GenerationDefaults
) -> None:
    def named(name: str) -> str:
        value = getattr(options, name)
        return (
            f"{_option(name)} {value}" if name in given else f"{defaults.file.name}: {name} {value}"
        )

    count = options.num_return_sequences
    if count > 1 and options.num_beams == 1 and not options.temperature:
        raise UsageError(
            f"{named('num_return_sequences')}: the most likely tokens are one continuation alone",
            hint="give --temperature above 0 or --num-beams as well, or --num-return-sequences 1",
        )
    if count > options.num_beams > 1:
        raise UsageError(
            f"{named('num_return_sequences')}, expected at most the {options.num_beams} beams",
            hint="give as many --num-beams, or fewer --num-return-sequences",
        )
    least, most = options.min_new_tokens, options.max_new_tokens
    if "min_new_tokens" in given and least and most and least > most:
        raise UsageError(
            f"{named('min_new_tokens')}, expected at most the {most} of max_new_tokens",
            hint="give more --max-new-tokens, or fewer --min-new-tokens",
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
