"""Recognize the shape of a record by its keys, and check what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptj_model.errors import UsageError
from runner.data.making.long_line import Damaged, json_kind, names

# Reasons for leaving a sound record out, as the counts name them.
OUT_OF_ORDER = "with turns out of order"
NO_ANSWER = "without an assistant turn"
NOTHING_COUNTED = "with weight 0 on every assistant turn"
EMPTY = "with an empty completion"

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
#: Role by the names that data sets use for it.
_ROLES = {
    **dict.fromkeys(("user", "human"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "bot", "model"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), SYSTEM),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), TOOL),
}

# Kinds of shapes: what a template is chosen by.
INSTRUCTION, COMPLETION, CHAT = "instruction", "completion", "chat"


@dataclass(frozen=True, slots=True)
class Shape:
    """Keys by which a record is recognized."""

    kind: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Required and optional keys."""
        return (*self.required, *self.optional)

    def __str__(self) -> str:
        return " and ".join(self.required)


SHAPES = (
    Shape(COMPLETION, ("prompt", "completion")),
    Shape(INSTRUCTION, ("instruction", "output"), ("input",)),
    Shape(INSTRUCTION, ("instruction", "response"), ("context",)),
    Shape(CHAT, ("messages",)),
    Shape(CHAT, ("conversations",)),
)
#: End of the name of a shape whose texts are lists of messages.
AS_MESSAGES = "as messages"
_EXPECTED = "; ".join(map(str, SHAPES))
_COLUMNS_HINT = "name them, as in `--columns prompt=question,completion=answer`"


@dataclass(frozen=True, slots=True)
class Columns:
    """Names that a data set uses in place of the keys of a shape."""

    sources: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name in the data set by the key that it stands for."""

    @classmethod
    def parse(cls, text: str) -> Columns:
        """Parse KEY=NAME,KEY=NAME.

        Raises:
            UsageError: the text has another form, or no shape has these keys.
        """
        pairs = [pair.partition("=") for pair in text.split(",") if pair]
        sources = {key.strip(): name.strip() for key, _, name in pairs}
        if not sources or len(sources) < len(pairs) or not all(sources.values()):
            raise UsageError(f"--columns is {text!r}, expected KEY=NAME,…", hint=_COLUMNS_HINT)
        if not any(set(sources) <= set(shape.keys) for shape in SHAPES):
            raise UsageError(
                f"--columns names {', '.join(sources)}, expected keys of one of: {_EXPECTED}",
                hint=_COLUMNS_HINT,
            )
        return cls(sources)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A record in the form that templates take."""

    shape: str
    """Name of its shape; all records of a file have the same."""
    kind: str
    values: dict[str, Any]
    """Texts by key: `prompt` and `completion`, or `instruction`, `input` and `output`. A chat has
    `messages`, each with `role` and `content`, and may have `tools`."""
    counts: tuple[bool, ...] = ()
    """Whether each message of a chat is one that the loss counts."""


def recognized(values: object, columns: Columns) -> tuple[Shape, dict[str, Any]]:
    """Return the shape of a record, and the record under the keys of the shape.

    Raises:
        Damaged: the record is not an object, or has no shape or several.
    """
    if not isinstance(values, dict):
        raise Damaged(f"holds {json_kind(values)}, expected an object")
    missing = [name for name in columns.sources.values() if name not in values]
    if missing:
        raise Damaged(
            f"has no {missing[0]!r}, found {names(values)}",
            hint="name the keys of the records with `--columns`",
        )
    record = {k: v for k, v in values.items() if k not in columns.sources.values()}
    record |= {key: values[name] for key, name in columns.sources.items()}
    fits = [
        shape
        for shape in SHAPES
        if all(key in record for key in shape.required) and set(columns.sources) <= set(shape.keys)
    ]
    if len(fits) == 1:
        return fits[0], record
    if fits:
        both = ", and ".join(map(str, fits))
        raise Damaged(
            f"fits several shapes: {both}",
            hint=f"choose one, as in `--columns {_assigned(fits[0])}`",
        )
    raise Damaged(f"has the keys {names(values)}, expected one of: {_EXPECTED}", hint=_COLUMNS_HINT)


def _assigned(shape: Shape) -> str:
    return ",".join(f"{key}={key}" for key in shape.required)


def sample(shape: Shape, record: dict[str, Any]) -> Sample:
    """Return a record of a shape in the form that templates take.

    Raises:
        Damaged: a value has the wrong type; or, with a reason, the record has nothing to learn.
    """
    if shape.kind == CHAT:
        return _chat(str(shape), record[shape.required[0]], record)
    if shape.kind == COMPLETION:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _prompted_chat(str(shape), prompt, completion, record)
        values = {key: _text(record, key) for key in shape.required}
    else:
        instruction, output = (_text(record, key) for key in shape.required)
        (key,) = shape.optional
        more = "" if record.get(key) is None else _text(record, key)
        values = {"instruction": instruction, "input": more, "output": output}
    if not values[list(values)[-1]].strip():
        raise Damaged(f"{shape.required[-1]!r} is empty", reason=EMPTY)
    return Sample(shape=str(shape), kind=shape.kind, values=values)


def asked(values: Mapping[str, Any]) -> Sample:
    """Return what a record asks as a sample without a completion, whether or not it has one.

    Raises:
        Damaged: the record has the key of no shape or of several, or a value has the wrong type;
            or its messages do not end with a turn that the assistant answers.
    """
    shapes = {shape.required[0]: shape for shape in SHAPES}
    found = [key for key in shapes if values.get(key) is not None]
    if len(found) != 1:
        keys = " and ".join(found) or f"the keys {names(values)}"
        raise Damaged(f"has {keys}, expected one of {', '.join(shapes)}")
    (key,) = found
    shape = shapes[key]
    if shape.kind == CHAT or isinstance(values[key], list):
        messages, _ = _messages(values[key], key)
        if messages[-1]["role"] in (ASSISTANT, SYSTEM):
            raise Damaged(
                f"ends with {_article(messages[-1]['role'])} turn, expected one that is answered",
                hint="end the messages with the user's turn",
            )
        _check_turns(messages)
        return _sample(key, messages, [False] * len(messages), values)
    if shape.kind == COMPLETION:
        return Sample(
            shape=key, kind=COMPLETION, values={key: _text(values, key), "completion": ""}
        )
    more = [k for s in SHAPES for k in s.optional if values.get(k) is not None]
    if len(more) > 1:
        raise Damaged(f"has {' and '.join(more)}, expected one of the two")
    texts = {key: _text(values, key), "input": _text(values, more[0]) if more else ""}
    return Sample(shape=key, kind=INSTRUCTION, values={**texts, "output": ""})


def _article(role: str) -> str:
    return f"an {role}" if role[0] in "aeiou" else f"a {role}"


def _text(record: Mapping[str, Any], key: str) -> str:
    if not isinstance(value := record[key], str):
        raise Damaged(f"{key!r} is {json_kind(value)}, expected a string")
    return value


def _chat(shape: str, turns: Any, record: Mapping[str, Any]) -> Sample:
    messages, weights = _messages(turns, shape)
    _check_order(messages)
    counts = [m["role"] == ASSISTANT and w for m, w in zip(messages, weights, strict=True)]
    if not any(counts):
        raise Damaged("has weight 0 on every assistant turn", reason=NOTHING_COUNTED)
    _check_content(messages, counts)
    return _sample(shape, messages, counts, record)


def _prompted_chat(shape: str, prompt: Any, completion: Any, record: Mapping[str, Any]) -> Sample:
    before, _ = _messages(prompt, "prompt")
    after, weights = _messages(completion, "completion")
    _check_order([*before, *after])
    counts = [m["role"] == ASSISTANT and w for m, w in zip(after, weights, strict=True)]
    if not any(counts):
        raise Damaged("'completion' has no assistant turn", reason=NO_ANSWER)
    messages, counts = [*before, *after], [False] * len(before) + counts
    _check_content(messages, counts)
    return _sample(f"{shape} {AS_MESSAGES}", messages, counts, record)


def _sample(
    shape: str, messages: list[dict[str, Any]], counts: Sequence[bool], record: Mapping[str, Any]
) -> Sample:
    tools = record.get("tools")
    values = {"messages": messages, "tools": tools if isinstance(tools, list) else None}
    return Sample(shape=shape, kind=CHAT, values=values, counts=tuple(counts))


def _messages(turns: Any, key: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """Return the messages of a chat, and whether each has a weight that lets it count."""
    if not isinstance(turns, list) or not turns:
        found = json_kind(turns) if turns != [] else "an empty list"
        raise Damaged(f"{key!r} is {found}, expected a list of messages")
    messages: list[dict[str, Any]] = []
    weights: list[bool] = []
    for number, turn in enumerate(turns, start=1):
        where = f"message {number} of {key!r}"
        if not isinstance(turn, dict):
            raise Damaged(f"{where} is {json_kind(turn)}, expected an object")
        # A table has every key in every row, null where a message lacks it.
        message = {k: v for k, v in turn.items() if v is not None or k == "content"}
        role, content = message.pop("role", None), message.pop("content", None)
        role = message.pop("from", role)
        content = message.pop("value", content)
        if not isinstance(role, str) or role.lower() not in _ROLES:
            found = names([role]) if isinstance(role, str) else json_kind(role)
            raise Damaged(f"{where} has the role {found}, expected one of {', '.join(_ROLES)}")
        weight = message.pop("weight", 1)
        if not isinstance(weight, int | float) or weight not in (0, 1):
            found = json_kind(weight) if not isinstance(weight, int | float) else weight
            raise Damaged(f"{where} has the weight {found}, expected 0 or 1")
        weights.append(bool(weight))
        text = _content(content, where, has_calls=bool(message.get("tool_calls")))
        messages.append({"role": _ROLES[role.lower()], "content": text, **message})
    return messages, weights


def _content(content: Any, where: str, *, has_calls: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and has_calls:
        return ""
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    found = "missing or null" if content is None else json_kind(content)
    raise Damaged(f"the content of {where} is {found}, expected a string")


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    _check_turns(messages)
    if not any(message["role"] == ASSISTANT for message in messages):
        raise Damaged("has no assistant turn", reason=NO_ANSWER)


def _check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    before = ""
    for message in messages:
        role = message["role"]
        if role == SYSTEM and before:
            raise Damaged("has a system message after other turns", reason=OUT_OF_ORDER)
        if role == ASSISTANT and before in ("", SYSTEM):
            raise Damaged("begins with an assistant turn", reason=OUT_OF_ORDER)
        if role == before and role in (USER, ASSISTANT):
            raise Damaged(f"has two {role} turns in a row", reason=OUT_OF_ORDER)
        if role == TOOL and before not in (ASSISTANT, TOOL):
            raise Damaged("has a tool turn that follows no assistant turn", reason=OUT_OF_ORDER)
        before = role


def _check_content(messages: Sequence[Mapping[str, Any]], counts: Sequence[bool]) -> None:
    for message, counted in zip(messages, counts, strict=True):
        if counted and not message["content"].strip() and not message.get("tool_calls"):
            raise Damaged("has an empty assistant turn", reason=EMPTY)
