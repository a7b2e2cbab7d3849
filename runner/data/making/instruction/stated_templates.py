"""Templates that records of instruction data were made with, so that prompts get the same text.

`data_params.json` beside the records states them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_model.errors import FileFault, UsageError
from runner.data.making.instruction.shapes import AS_MESSAGES, CHAT, SHAPES
from runner.data.making.instruction.templates import Template, checked
from runner.data.making.sources import TEST, TRAIN, VALIDATION
from runner.data.reading.data_params import DATA_PARAMS_FILE, read_params

#: Value of `kind` in the arguments of instruction data.
INSTRUCT = "instruct"
_KINDS = {str(shape): shape.kind for shape in SHAPES}


@dataclass(frozen=True, kw_only=True, slots=True)
class StatedTemplates:
    """How the samples of some records were rendered."""

    templates: Mapping[str, Template]
    """Template by the kind of the samples; only kinds that the records have."""
    date: str = ""
    """Day in ISO format that the templates were given; "" if none asks for it."""
    allow_special: bool = False
    """Whether the name of a special token in a record was read as that token."""
    tokenizer_sha256: str | None = None
    """Digest of the tokenizer; None if it is not known."""

    def to_json(self) -> dict[str, Any]:
        """Return the templates as JSON values, which `from_json` reads."""
        templates = {k: {"name": t.name, "text": t.text} for k, t in self.templates.items()}
        return {
            "templates": templates,
            "date": self.date,
            "allow_special": self.allow_special,
            "tokenizer_sha256": self.tokenizer_sha256,
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], path: Path, kinds: Iterable[str] | None = None
    ) -> StatedTemplates:
        """Return the templates that JSON values state.

        Args:
            values: those of `to_json`, or the arguments in data_params.json.
            path: file that they come from.
            kinds: kinds of samples that the records have; None takes all that are stated.

        Raises:
            FileFault: the values are not those of this program.
            UsageError: a template is not valid.
        """
        try:
            stated = values["templates"]
            return cls(
                templates={
                    kind: checked(
                        Template(str(stated[kind]["name"]), str(stated[kind]["text"])), path
                    )
                    for kind in sorted(stated if kinds is None else kinds)
                },
                date=str(values.get("date", "")),
                allow_special=bool(values.get("allow_special")),
                tokenizer_sha256=values.get("tokenizer_sha256"),
            )
        except (KeyError, TypeError, AttributeError):
            raise FileFault(
                f"{path}: states no templates, expected those of `gptj data instruct`",
                hint="name a template with --template, or make the records again",
            ) from None


def stated_templates(folder: Path) -> StatedTemplates | None:
    """Return the templates of the records in a folder, or in its parts train, val and test.

    Returns:
        The templates, or None if no data_params.json there describes instruction data.

    Raises:
        FileFault: a data_params.json is damaged.
        UsageError: the parts were made with several templates.
    """
    found: list[StatedTemplates] = []
    for part in (folder, *(folder / name for name in (TRAIN, VALIDATION, TEST))):
        values = read_params(part)
        if values and values["arguments"].get("kind") == INSTRUCT:
            kinds = {_kind(shape) for shape in values["counts"].get("shapes", {})}
            path = part / DATA_PARAMS_FILE
            found.append(StatedTemplates.from_json(values["arguments"], path, kinds or None))
    return joined(found, str(folder)) if found else None


def _kind(shape: str) -> str:
    return CHAT if shape.endswith(AS_MESSAGES) else _KINDS.get(shape, shape)


def joined(several: Iterable[StatedTemplates], where: str) -> StatedTemplates:
    """Return the templates of records that were made by one or several commands.

    Args:
        several: templates of each folder, at least one.
        where: name of all the folders, for errors.

    Raises:
        UsageError: the folders differ in the template of a kind, or in how special tokens or the
            date are read.
    """
    first, *others = several
    templates = dict(first.templates)
    for other in others:
        same = (first.date, first.allow_special) == (other.date, other.allow_special)
        if not same or any(templates.get(k, t) != t for k, t in other.templates.items()):
            raise UsageError(
                f"{where}: the records were made with several templates or settings, expected one",
                hint="name the template with --template NAME, or the folder of one of them",
            )
        templates |= other.templates
    return StatedTemplates(
        templates=templates,
        date=first.date,
        allow_special=first.allow_special,
        tokenizer_sha256=first.tokenizer_sha256,
    )
