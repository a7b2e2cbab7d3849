"""Prompts as they are given: one of the command line, or those of a file."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gptj_model.config import GPTJConfig
from gptj_model.decoding.options import GenerationOptions
from gptj_model.errors import DataFault, GptjError, UsageError

#: Keys of objects that only a template turns into a prompt.
_RECORDS = ("instruction", "messages", "conversations")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt, as text or as token ids."""

    where: str
    """Option that gives the prompt, or file and line."""
    text: str | None = None
    ids: list[int] | None = None
    record: Mapping[str, Any] | None = None
    """What a JSON object asks, for a template to render."""
    carried: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields that the output repeats."""
    fault: type[GptjError] = UsageError
    """Kind of the error that a prompt raises that cannot be continued."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """Tokens that a continuation begins with."""

    prompt: Prompt
    ids: list[int]
    dropped: int
    """Number of tokens of the prompt that were dropped at its beginning."""


def begin_all(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer | None,
    options: GenerationOptions,
    config: GPTJConfig,
    *,
    truncate: bool,
) -> list[Begun]:
    """Return the tokens of each prompt.

    Args:
        prompts: the prompts.
        tokenizer: tokenizer of the model; None if every prompt is given as ids.
        options: options of generation.
        config: configuration of the model.
        truncate: whether a prompt that is too long loses its beginning.

    Raises:
        GptjError: the model cannot continue a prompt; with its place.
    """
    room = options.room(config)
    begun: list[Begun] = []
    for prompt in prompts:
        whole = prompt.ids
        if whole is None:
            assert tokenizer is not None, "a text needs a tokenizer"
            whole = tokenizer.encode(prompt.text or "").ids
        ids = whole[-room:] if truncate and room > 0 else whole
        if problem := options.problem(ids, config):
            cut = "" if truncate else "--truncate drops the beginning of a prompt; "
            hint = f"{cut}fewer --max-new-tokens leave room" if len(ids) > room else None
            raise prompt.fault(f"{prompt.where}: {problem}", hint=hint)
        begun.append(Begun(prompt=prompt, ids=ids, dropped=len(whole) - len(ids)))
    return begun


def prompt_of_argument(text: str | None, ids: str | None) -> Prompt:
    """Return the prompt of `--prompt` or `--ids`.

    Raises:
        UsageError: the text is not UTF-8, or the ids are not whole numbers.
    """
    if ids is None:
        return Prompt(where="--prompt", text=checked_argument("--prompt", text or ""))
    try:
        return Prompt(where="--ids", ids=[int(part) for part in ids.split(",")])
    except ValueError:
        raise UsageError(f"--ids takes numbers separated by commas, found {ids!r}") from None


def checked_argument(option: str, text: str) -> str:
    """Return the text of an option.

    Raises:
        UsageError: the text is empty or not UTF-8.
    """
    if not text:
        raise UsageError(f"{option} is empty, expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        byte = ord(text[e.start]) & 0xFF
        raise UsageError(f"{option} is not UTF-8: it holds the byte 0x{byte:02x}") from None
    return text


def read_prompts(path: Path, *, for_template: bool = False) -> list[Prompt]:
    """Return the prompts of a file: one per line, as text or as JSON objects.

    Lines end with LF or CRLF; a byte order mark is no part of the first. A file is JSON lines if
    its name ends with .jsonl, or if every line is a JSON object.

    Args:
        path: file to read.
        for_template: whether objects are records that a template renders.

    Raises:
        DataFault: the file or a line is empty, or is not UTF-8 or not what it must be; with the
            line.
    """
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    lines = [_decoded(f"{path}:{n}", line) for n, line in _numbered(data)]
    if path.suffix == ".jsonl" or all(map(_is_object, lines)):
        read = _of_record if for_template else _of_object
        return [read(f"{path}:{n}", line) for n, line in enumerate(lines, start=1)]
    return [
        Prompt(where=f"{path}:{n}", text=line, fault=DataFault)
        for n, line in enumerate(lines, start=1)
    ]


def _numbered(data: bytes) -> enumerate[bytes]:
    lines = data.removesuffix(b"\n").split(b"\n")
    return enumerate((line.removesuffix(b"\r") for line in lines), start=1)


def _decoded(where: str, line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise DataFault(f"{where}: is not UTF-8") from None
    if not text:
        raise DataFault(f"{where}: is empty, expected a prompt on every line")
    return text


def _is_object(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_record(where: str, line: str) -> Prompt:
    values = _object(where, line)
    asked = {key: value for key, value in values.items() if key != "id"}
    if _has_surrogate(json.dumps(asked, ensure_ascii=False)):
        raise DataFault(f"{where}: holds half of a surrogate pair, expected Unicode text")
    return Prompt(where=where, record=values, carried=_carried(values), fault=DataFault)


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as e:
        raise DataFault(f"{where}: is not valid JSON: {e}") from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise DataFault(f"{where}: holds a JSON {found}, expected an object with prompt or ids")
    return values


def _carried(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": values["id"]} if "id" in values else {}


def _of_object(where: str, line: str) -> Prompt:
    values = _object(where, line)
    given = [name for name in ("prompt", "ids") if values.get(name) is not None]
    if len(given) != 1:
        keys = ", ".join(map(repr, values)) or "none"
        found = "both prompt and ids" if given else f"neither prompt nor ids; its keys are {keys}"
        hint = "give --template or --chat" if any(map(values.get, _RECORDS)) else None
        raise DataFault(f"{where}: has {found}, expected one of the two", hint=hint)
    text, ids = values.get("prompt"), values.get("ids")
    if text is not None and not isinstance(text, str):
        raise DataFault(f"{where}: prompt is {text!r:.200}, expected a text")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise DataFault(f"{where}: ids is {ids!r:.200}, expected a list of token ids")
    if text is not None and _has_surrogate(text):
        raise DataFault(f"{where}: prompt holds half of a surrogate pair, expected Unicode text")
    return Prompt(where=where, text=text, ids=ids, carried=_carried(values), fault=DataFault)


def _has_surrogate(text: str) -> bool:
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large a number")
    return value
