"""Templates: the text of a sample, and the parts of it that the loss counts.

Templates are Jinja, rendered as transformers renders a chat template. The template of a chat reads
`messages`; that of instructions reads `instruction`, `input` and `output`, or `prompt` and
`completion`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptj_convert.files.json_file import read_json
from gptj_convert.formats.layouts.hf import TOKENIZER_CONFIG_FILE
from gptj_model.errors import FileFault, UsageError
from runner.data.making.instruction.shapes import ASSISTANT, CHAT, COMPLETION, INSTRUCTION, Sample
from runner.data.making.long_line import Damaged

CHAT_TEMPLATE_FILE = "chat_template.jinja"

#: Marks around a completion while a template is rendered, and within the name of a special token
#: that is text: code points that Unicode keeps for such uses.
_OPEN, _CLOSE, SPLIT = "\ufdd1", "\ufdd2", "\ufdd0"
_MARK = re.compile(f"[{_OPEN}{_CLOSE}]")
#: Text in place of an answer that is not known yet, and the same between marks.
_LETTER = "x"
_ANSWER = f"{_OPEN}{_LETTER}{_CLOSE}"

#: Name of the template that adds nothing.
_PLAIN = "plain"
_ALPACA_BEGIN = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request."
#: Names of the templates that are part of this program, and their text.
BUILT_IN = {
    "alpaca": (
        "{% if input %}"
        f"{_ALPACA_BEGIN}, paired with an input that provides further context. {_REQUEST}\n\n"
        "### Instruction:\n{{ instruction }}\n\n### Input:\n{{ input }}\n\n"
        "### Response:\n{{ output }}{% else %}"
        f"{_ALPACA_BEGIN}. {_REQUEST}\n\n"
        "### Instruction:\n{{ instruction }}\n\n### Response:\n{{ output }}{% endif %}"
    ),
    "dolly": (
        f"{_ALPACA_BEGIN}. {_REQUEST}\n\n### Instruction:\n{{{{ instruction }}}}\n\n"
        "{% if input %}Input:\n{{ input }}\n\n{% endif %}"
        "### Response:\n{{ output }}\n\n### End"
    ),
    _PLAIN: "{{ prompt }}{{ completion }}",
    "plain-chat": (
        "{% for message in messages %}"
        "{% if not loop.first %}{{ '\\n' }}{% endif %}"
        "{% if message.role == 'system' %}{{ message.content }}"
        "{% elif message.role == 'assistant' %}"
        "{{ 'Assistant: ' + message.content + eos_token }}"
        "{% else %}{{ message.role | capitalize + ': ' + message.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
    ),
}
#: Name of the tokenizer's own template.
TOKENIZERS = "chat"
NAMES = (*BUILT_IN, TOKENIZERS)

#: Largest size in bytes of a template, and of a tokenizer_config.json.
_MAX_BYTES, _MAX_CONFIG, _MAX_MARKS = 2**20, 32 * 2**20, 2**21


@dataclass(frozen=True, slots=True)
class Template:
    """A template as it is recorded in data_params.json."""

    name: str
    text: str

    @property
    def is_chat(self) -> bool:
        """Whether it takes messages."""
        return "messages" in _variables(self.text)

    @property
    def has_date(self) -> bool:
        """Whether its result depends on the date."""
        return "strftime_now" in self.text


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a sample, and what the loss counts in it."""

    text: str
    """Text, with `SPLIT` within the names of special tokens that are text."""
    spans: tuple[tuple[int, int], ...]
    """Begin and end of each part that the loss counts."""
    ends_counted: bool
    """Whether the loss counts the end-of-text after the text."""


def find_template(name: str, tokenizer: Path) -> Template:
    """Return the template of a name, or of a file.

    Args:
        name: name of a built-in template, `chat`, or path of a Jinja file.
        tokenizer: folder of the tokenizer, whose own template `chat` is.

    Raises:
        UsageError: there is no such template, or it is not valid.
        FileFault: a file cannot be read.
    """
    if name in BUILT_IN:
        return Template(name, BUILT_IN[name])
    if name == TOKENIZERS:
        if found := tokenizers_template(tokenizer):
            return found
        raise UsageError(
            f"{tokenizer}: has no chat template, expected {CHAT_TEMPLATE_FILE}",
            hint="choose another template with --template, such as plain-chat",
        )
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"--template is {name!r}, expected {', '.join(NAMES)}, or a file",
            hint="name an existing file of Jinja, such as ./template.jinja",
        )
    return checked(Template(name, _read(path)), path)


def tokenizers_template(folder: Path) -> Template | None:
    """Return the chat template of a tokenizer's folder, or None.

    Raises:
        UsageError: the template is not valid, or there are several without a default.
        FileFault: a file cannot be read.
    """
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return checked(Template(TOKENIZERS, _read(path)), path)
    path = folder / TOKENIZER_CONFIG_FILE
    if not path.is_file():
        return None
    config = read_json(path, expected="a JSON object", max_bytes=_MAX_CONFIG, max_marks=_MAX_MARKS)
    text = config.get("chat_template")
    if isinstance(text, list):  # several, each with a name
        named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
        text = named.get("default")
        if text is None:
            raise UsageError(
                f"{path}: has several chat templates and none called default",
                hint="save the one to use in a file, and name it with --template",
            )
    if not isinstance(text, str):
        return None
    return checked(Template(TOKENIZERS, text), path)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if len(data) > _MAX_BYTES:
            raise FileFault(f"{path}: has {len(data)} bytes, expected a template")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise FileFault(f"{path}: cannot be read: {e}") from None


def checked(template: Template, path: Path) -> Template:
    """Return a template that a file holds.

    Raises:
        UsageError: it is not valid.
    """
    try:
        variables = _variables(template.text)
    except jinja2.TemplateSyntaxError as e:
        raise UsageError(f"{path}:{e.lineno}: is not a Jinja template: {e.message}") from None
    if not variables & {"messages", "output", "completion"}:
        raise UsageError(
            f"{path}: reads none of messages, output and completion, expected a template that "
            "writes a completion"
        )
    return template


@lru_cache(maxsize=8)
def _variables(text: str) -> frozenset[str]:
    return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(text)))


class _Generation(jinja2.ext.Extension):
    """The block `generation`, around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        """Return the block as a call that puts marks around its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _environment(date: datetime | None = None) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form: str) -> str:
        return (date or datetime.now()).strftime(form)

    environment.filters["tojson"] = tojson
    functions: dict[str, Any] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals.update(functions)
    return environment


class Renderer:
    """Renders samples by one template.

    Args:
        template: template that `find_template` returned.
        special: names of special tokens by their keys, such as `eos_token`.
        date: day for templates that ask for it.
    """

    def __init__(
        self, template: Template, special: Mapping[str, str], date: datetime | None = None
    ) -> None:
        self._name = template.name
        self._is_chat = template.is_chat
        self._marks_turns = "endgeneration" in template.text
        self._special = special
        environment = _environment(date)
        if not self._is_chat:
            # A key that no sample has is a mistake; a chat may lack what a template asks for.
            environment.undefined = jinja2.StrictUndefined
        self._template = environment.from_string(template.text)

    def __call__(self, sample: Sample) -> Rendered:
        """Return the text of a sample.

        Raises:
            Damaged: the template does not take the sample, or does not show its completion.
        """
        if not self._is_chat:
            return self._fields(sample)
        if sample.kind != CHAT:
            sample = _as_chat(sample)
        return self._chat(sample)

    def prompt(self, sample: Sample) -> str:
        """Return the text of a sample up to where its completion begins.

        Args:
            sample: sample whose completion is empty, or whose messages end with another turn than
                the assistant's.

        Raises:
            Damaged: the template does not take the sample, or does not show a completion.
        """
        if not self._is_chat:
            return self._before(self._values(sample))
        if sample.kind != CHAT:
            sample = _as_chat(sample)
            sample.values["messages"].pop()
        messages = sample.values["messages"]
        if not self._marks_turns:
            return _unmarked(self._rendered(sample, len(messages), asks=True))[0]
        whole, at = self._answered(sample)
        begin = whole.rfind(_OPEN, 0, at)
        if begin < 0:
            raise Damaged(f"the template {self._name!r} does not mark the assistant's last turn")
        return _unmarked(whole[:begin])[0]

    def after_turn(self, sample: Sample) -> str:
        """Return what a chat template writes after the assistant's answer to a chat, and "" for
        other templates."""
        if not self._is_chat:
            return ""
        if sample.kind != CHAT:
            sample = _as_chat(sample)
            sample.values["messages"].pop()
        try:
            whole, at = self._answered(sample)
        except Damaged:  # a template may refuse an answer of one letter
            return ""
        return _unmarked(whole[at + len(_ANSWER) :])[0]

    def _answered(self, sample: Sample) -> tuple[str, int]:
        """Return the text of a chat with an answer, its marks, and where the answer is."""
        messages = [*sample.values["messages"], {"role": ASSISTANT, "content": _ANSWER}]
        values = sample.values | {"messages": messages}
        whole = self._render(values | {"documents": None, "add_generation_prompt": False})
        if (at := whole.rfind(_ANSWER)) < 0:
            raise Damaged(f"the template {self._name!r} does not show the assistant's turn")
        return whole, at

    def _fields(self, sample: Sample) -> Rendered:
        values = self._values(sample)
        text, _ = _unmarked(self._render(values))
        # A second rendering shows where the completion begins, whatever filters cut off its end.
        before = self._before(values)
        if not text.startswith(before):
            raise Damaged(f"the template {self._name!r} does not show the completion")
        # What follows the completion is written by the model as well.
        return Rendered(text, ((len(before), len(text)),), ends_counted=True)

    def _values(self, sample: Sample) -> dict[str, Any]:
        """Return the variables of a template without messages."""
        values = dict(sample.values)
        if sample.kind == CHAT:
            raise Damaged(
                f"holds messages, and the template {self._name!r} takes none",
                hint="choose a template that takes messages, such as `--template plain-chat`",
            )
        if sample.kind == INSTRUCTION and self._name == _PLAIN:
            raise Damaged(
                "holds an instruction, and the template 'plain' joins a prompt and its completion",
                hint="choose a template for instructions, such as `--template alpaca`",
            )
        if sample.kind == INSTRUCTION:
            values["prompt"] = _request(values)
            values["completion"] = values["output"]
        else:
            values |= {"instruction": values["prompt"], "input": "", "output": values["completion"]}
        return values

    def _before(self, values: Mapping[str, Any]) -> str:
        """Return the text before the completion."""
        marked = {
            key: f"{_OPEN}{values[key] or _LETTER}{_CLOSE}" for key in ("output", "completion")
        }
        before, mark, _ = self._render(dict(values) | marked).partition(_OPEN)
        if not mark:
            raise Damaged(f"the template {self._name!r} does not show the completion")
        return before

    def _chat(self, sample: Sample) -> Rendered:
        messages = sample.values["messages"]
        whole, marked = _unmarked(self._rendered(sample, len(messages)))
        turns = [n for n, message in enumerate(messages) if message["role"] == ASSISTANT]
        if self._marks_turns:
            if len(marked) != len(turns):
                raise Damaged(
                    f"the template {self._name!r} marks {len(marked)} generations, expected one "
                    f"for each of the {len(turns)} assistant turns"
                )
            spans = [s for s, n in zip(marked, turns, strict=True) if sample.counts[n]]
        else:
            spans = [self._turn(sample, n, whole) for n in turns if sample.counts[n]]
        return Rendered(whole, tuple(spans), ends_counted=sample.counts[-1])

    def _turn(self, sample: Sample, number: int, whole: str) -> tuple[int, int]:
        """Return where an assistant turn begins and ends, by rendering the chat up to it."""
        before = self._rendered(sample, number, asks=True)
        after = self._rendered(sample, number + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise Damaged(
                f"the template {self._name!r} changes a turn when another follows, so the "
                f"assistant's turn {number + 1} cannot be found in the text",
                hint="mark it in the template with {% generation %} … {% endgeneration %}, and "
                "name the changed template with --template",
            )
        return len(before), len(after)

    def _rendered(self, sample: Sample, count: int, *, asks: bool = False) -> str:
        values = sample.values | {"messages": sample.values["messages"][:count]}
        return self._render(values | {"documents": None, "add_generation_prompt": asks})

    def _render(self, values: Mapping[str, Any]) -> str:
        try:
            return self._template.render(**(dict(self._special) | dict(values)))
        except jinja2.TemplateError as e:
            raise Damaged(f"the template {self._name!r} refuses it: {e.message}") from None
        except Exception as e:  # a template is a program that another has written
            what = f"{type(e).__name__}: {e}"
            raise Damaged(f"the template {self._name!r} fails: {what}") from None


def _request(values: Mapping[str, str]) -> str:
    return "\n\n".join(filter(None, (values["instruction"], values["input"])))


def _as_chat(sample: Sample) -> Sample:
    values = sample.values
    if sample.kind == COMPLETION:
        user, assistant = values["prompt"], values["completion"]
    else:
        user, assistant = _request(values), values["output"]
    messages = [{"role": "user", "content": user}, {"role": ASSISTANT, "content": assistant}]
    return Sample(
        shape=sample.shape,
        kind=CHAT,
        values={"messages": messages, "tools": None},
        counts=(False, True),
    )


def has_marks(text: str) -> bool:
    """Return whether a text holds code points that mark parts of a text here."""
    return bool(_MARK.search(text)) or SPLIT in text


def _unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a rendered text without marks, and what they enclosed."""
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    begin = at = size = 0
    for mark in _MARK.finditer(text):
        parts.append(text[at : mark.start()])
        size += len(parts[-1])
        at = mark.end()
        if mark[0] == _OPEN:
            begin = size
        else:
            spans.append((begin, size))
    return "".join((*parts, text[at:])), spans
