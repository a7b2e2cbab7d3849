"""Turn records of instruction data into tokens, of which the loss counts the completions.

The text of a sample is tokenized once and as a whole. A token counts if it holds a character of a
completion, also where it begins before the completion does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from gptj_model.errors import DataFault
from runner.data.making.documents.document import Form, Problem, Raw, Reading
from runner.data.making.encoding import (
    TOO_LONG,
    Chunk,
    Encoded,
    Encoder,
    parse_object,
    problem,
)
from runner.data.making.instruction.packing import ExamplePacker, sequence, units
from runner.data.making.instruction.sample_tokens import SampleTokens
from runner.data.making.instruction.shapes import Columns, Sample, recognized, sample
from runner.data.making.instruction.templates import SPLIT, Rendered, Renderer, Template
from runner.data.making.long_line import Damaged
from runner.data.making.sources import read
from runner.data.making.summarization import Pairs
from runner.data.making.tokenizer import end_of_text, facts
from runner.data.remote.path import place

CUT, SKIP, STOP = "cut", "skip", "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructOptions:
    """How records become examples."""

    tokenizer: Path
    length: int
    """Number of tokens per example, max_sequence_length."""
    templates: Mapping[str, Template]
    """Template by the kind of the samples that it takes."""
    columns: Columns = field(default_factory=Columns)
    allow_special: bool = False
    """Read the name of a special token in a record as that token instead of as text."""
    train_on_prompt: bool = False
    """Count every token in the loss instead of only the completions."""
    packing: bool = True
    """Put several examples into a sequence."""
    too_long: str = SKIP
    """What to do with an example that does not fit: `CUT`, `SKIP` or `STOP`."""
    date: str = ""
    """Day in ISO format for templates that ask for it."""

    def open(self) -> Encoder:
        """Return an encoder with these options."""
        return InstructEncoder(self)


class InstructEncoder:
    """Turns records into units of `packing`, or into examples where nothing is packed.

    Raises:
        FileFault: the tokenizer does not exist or cannot be read.
    """

    def __init__(self, options: InstructOptions) -> None:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # the encoder runs in several processes instead
        self._options = options
        self._tokens = SampleTokens(options.tokenizer, allow_special=options.allow_special)
        self._end = self._tokens.end
        date = datetime.fromisoformat(options.date) if options.date else None
        self._renderers = {
            kind: Renderer(template, self._tokens.special, date)
            for kind, template in options.templates.items()
        }
        self._shapes: dict[str, tuple[str, str]] = {}

    def __call__(self, chunk: Chunk) -> Encoded:
        """Return the units or examples of a chunk.

        Raises:
            DataFault: an example is too long, and the options say to stop.
        """
        found = Encoded(self._nothing())
        items: list[Raw] = []
        texts: list[Rendered] = []
        for item in chunk:
            found.documents += isinstance(item, Raw)
            try:
                made = self._sample(item)
                rendered = self._render(made, found)
            except Damaged as e:
                found.documents -= isinstance(item, Raw) and not e.reason
                found.problems.append(problem(item, e))
                continue
            assert isinstance(item, Raw)
            items.append(item)
            texts.append(rendered)
            found.shapes[made.shape] = found.shapes.get(made.shape, 0) + 1
        made_units: list[np.ndarray] = []
        encoded = self._tokens.encode([rendered.text for rendered in texts])
        for item, rendered, (ids, offsets) in zip(items, texts, encoded, strict=True):
            try:
                example = self._example(item, rendered, ids, offsets, found)
            except Damaged as e:
                found.problems.append(problem(item, e))
                continue
            if example is not None:
                made_units.append(example)
        if made_units:
            pack = np.concatenate if self._options.packing else np.stack
            found.units = pack(made_units)
        return found

    def _nothing(self) -> np.ndarray:
        shape = (0, 2) if self._options.packing else (0, 3, self._options.length)
        return np.empty(shape, np.int32)

    def _sample(self, item: Raw | Problem) -> Sample:
        """Return a document as a sample.

        Raises:
            Damaged: it is malformed, breaks a rule, or has another shape than its file.
        """
        made = self._recognized(item)
        assert isinstance(item, Raw)
        if item.path not in self._shapes:
            self._shapes[item.path] = self._first_shape(item.path)
        shape, where = self._shapes[item.path]
        if made.shape != shape:
            raise Damaged(
                f"has the shape {made.shape!r}, expected {shape!r} as at {where}",
                hint="divide the file by the keys of its records",
            )
        return made

    def _recognized(self, item: Raw | Problem) -> Sample:
        if isinstance(item, Problem):
            raise Damaged(item.what, hint=item.hint)
        if item.form is not Form.JSON:
            raise Damaged(f"is {item.form.value}, expected a record with named values")
        return sample(*recognized(parse_object(item.data), self._options.columns))

    def _first_shape(self, path: str) -> tuple[str, str]:
        """Return the shape of the first sound record of a file, and its place."""
        reading = Reading(rows=True, spool=Path(tempfile.gettempdir()))
        with closing(read([place(path)], reading)) as items:
            for item in items:
                try:
                    return self._recognized(item).shape, getattr(item, "where", "")
                except Damaged:
                    continue
        raise DataFault(f"{path}: has changed while it was read")

    def _render(self, made: Sample, found: Encoded) -> Rendered:
        """Return the text of a sample, in which names of special tokens are split."""

        def tell(names: int) -> None:
            found.special_names += names

        values = self._tokens.protected(made.values, tell)
        made = Sample(shape=made.shape, kind=made.kind, values=values, counts=made.counts)
        return self._renderers[made.kind](made)

    def _example(
        self, item: Raw, rendered: Rendered, ids: list[int], offsets: np.ndarray, found: Encoded
    ) -> np.ndarray | None:
        options = self._options
        found.bytes += len(rendered.text.replace(SPLIT, "").encode())
        counted = np.zeros(len(ids), bool)
        if options.train_on_prompt:
            counted[:] = True
        for begin, end in rendered.spans:
            a, b = (at - rendered.text.count(SPLIT, 0, at) for at in (begin, end))
            counted |= (offsets[:, 0] < b) & (np.maximum(offsets[:, 1], offsets[:, 0] + 1) > a)
        if not ids or ids[-1] != self._end:
            ids = [*ids, self._end]
            counted = np.append(counted, rendered.ends_counted or options.train_on_prompt)
        if counted[0] and not options.train_on_prompt:
            # The loss counts a token only after another one.
            ids, counted = [self._end, *ids], np.insert(counted, 0, False)
        if len(ids) > options.length + 1:
            if options.too_long == STOP:
                raise DataFault(
                    f"{item.where}: needs {len(ids) - 1} tokens, max_sequence_length is "
                    f"{options.length}",
                    hint=f"set --max-sequence-length {len(ids) - 1} or more, or leave long "
                    "examples out with `--too-long skip`",
                )
            ids, counted = ids[: options.length + 1], counted[: options.length + 1]
            if options.too_long == SKIP or not counted[1:].any():
                found.left_out[TOO_LONG] = found.left_out.get(TOO_LONG, 0) + 1
                return None
            found.cut += 1
        found.tokens += len(ids)
        made = units(ids, counted)
        return made if options.packing else sequence(made, options.length, self._end)


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructRecipe:
    """Examples of instruction data; see `runner.data.making.build.Recipe`."""

    options: InstructOptions

    @property
    def length(self) -> int:
        """See `Recipe`."""
        return self.options.length

    @property
    def arguments(self) -> dict[str, Any]:
        """See `Recipe`."""
        options = self.options
        return {
            "kind": "instruct",
            "max_sequence_length": self.length,
            **facts(options.tokenizer),
            "allow_special": options.allow_special,
            "templates": {
                kind: {"name": template.name, "text": template.text}
                for kind, template in options.templates.items()
            },
            "columns": dict(options.columns.sources),
            "train_on_prompt": options.train_on_prompt,
            "packing": options.packing,
            "too_long": options.too_long,
            "date": options.date,
        }

    def reading(self, spool: Path) -> Reading:
        """See `Recipe`."""
        return Reading(rows=True, spool=spool)

    def encoder(self, split: str) -> Callable[[], Encoder]:
        """See `Recipe`."""
        return self.options.open

    def assembler(self, made: int) -> ExamplePacker | Pairs:
        """See `Recipe`."""
        if self.options.packing:
            return ExamplePacker(self.length, end_of_text(self.options.tokenizer))
        return Pairs(self.length)
