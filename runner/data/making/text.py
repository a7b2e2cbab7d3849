"""Make packed examples of text: one stream of documents, each followed by one end-of-text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptj_model.errors import DataFault
from runner.data.making import pieces
from runner.data.making.documents.document import Form, Problem, Raw, Reading
from runner.data.making.encoding import Chunk, Encoded, Encoder, decode, parse_object, problem
from runner.data.making.long_line import Damaged, names, string_of
from runner.data.making.packing import Packer
from runner.data.making.tokenizer import SpecialNames, end_of_text, facts, loaded, may_cut

#: Number of characters tokenized in one call: until its id is read, a token takes 100 bytes.
_TOGETHER = 2**18


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How text becomes tokens."""

    tokenizer: Path
    allow_special: bool = False
    """Read the name of a special token in a text as that token instead of as text."""
    key: str = "text"
    """Key of the document's text in a JSON object."""
    ftfy: str | None = None
    """Repair mojibake and convert the text to this Unicode normal form; None leaves it."""
    wikitext_detokenize: bool = False
    """Undo the tokenization of WikiText."""

    def open(self) -> Encoder:
        """Return an encoder with these options."""
        return TextEncoder(self)


class TextEncoder:
    """Turns documents into tokens, each document followed by one end-of-text.

    Raises:
        FileFault: the tokenizer does not exist or cannot be read.
    """

    def __init__(self, options: TextOptions) -> None:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # the encoder runs in several processes instead
        self._options = options
        self._tokenizer = loaded(options.tokenizer, options.allow_special)
        self._end = end_of_text(options.tokenizer)
        self._may_cut = may_cut(self._tokenizer)
        self._names = SpecialNames(self._tokenizer)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Return the tokens of a chunk, int32."""
        found = Encoded(np.empty(0, np.int32))
        texts: list[tuple[str, bool]] = []
        for item in chunk:
            try:
                text = self._text(item)
            except Damaged as e:
                found.problems.append(problem(item, e))
                continue
            assert isinstance(item, Raw)
            found.documents += not item.more
            if self._may_cut:
                texts += ((piece, False) for piece in pieces.cut(text, _TOGETHER))
            else:
                texts.append((text, False))
            texts[-1] = (texts[-1][0], not item.more)
        ids: list[int] = []
        for group in _groups(texts):
            encodings = self._tokenizer.encode_batch_fast(
                [text for text, _ in group], add_special_tokens=False
            )
            for encoding, (text, ends) in zip(encodings, group, strict=True):
                ids += encoding.ids
                if ends:
                    ids.append(self._end)
                found.bytes += len(text.encode())
                found.special_names += self._names.count(text)
        found.units = np.array(ids, np.int32)
        found.tokens = len(ids)
        return found

    def _text(self, item: Raw | Problem) -> str:
        if isinstance(item, Problem):
            raise Damaged(item.what)
        if item.form is Form.JSON:
            text = self._value(parse_object(item.data))
        elif item.form is Form.TEXT:
            text = decode(item)
        else:
            raise Damaged(f"is {item.form.value}, expected text")
        if item.more and not self._may_cut:
            raise DataFault(
                f"{item.where}: is too long for this tokenizer; only with a tokenizer like GPT-2's "
                "does a document keep its tokens when it is cut",
                hint="split the document, or use GPT-J's tokenizer",
            )
        if self._options.ftfy:
            text = _repaired(text, self._options.ftfy)
        return wikitext_detokenized(text) if self._options.wikitext_detokenize else text

    def _value(self, values: object) -> str:
        key = self._options.key
        if isinstance(values, dict) and key not in values and values:
            raise Damaged(
                f"has no {key!r}, found {names(values)}",
                hint="name the key of the text with `--text-key`",
            )
        return string_of(values, key)


def _groups(texts: list[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    group: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text[0])
        if size >= _TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


def _repaired(text: str, form: str) -> str:
    import ftfy

    return ftfy.fix_text(text, ftfy.TextFixerConfig(normalization=form))  # pyright: ignore


def wikitext_detokenized(text: str) -> str:
    """Remove the spaces that the tokenization of WikiText put around punctuation."""
    for found, put in _WIKITEXT:
        text = re.sub(found, put, text)
    return text


#: Patterns of tokenized WikiText and their replacements, applied in this order.
_WIKITEXT = (
    (r"s '", "s'"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    *((f" {re.escape(sign)} ", f"{sign} ") for sign in ":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    *((" ".join("=" * n), "=" * n) for n in (4, 3, 2)),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRecipe:
    """Packed text; see `runner.data.making.build.Recipe`."""

    options: TextOptions
    length: int
    whole_files: bool = False
    """Read every file as one document."""
    short_seq_prob: float = 0.0
    seed: int = 0
    keep_all: bool = True
    """Put every token into an example; see `Packer`."""

    @property
    def arguments(self) -> dict[str, Any]:
        """See `Recipe`."""
        return {
            "kind": "text",
            "max_sequence_length": self.length,
            **facts(self.options.tokenizer),
            "allow_special": self.options.allow_special,
            "key": self.options.key,
            "ftfy": self.options.ftfy,
            "wikitext_detokenize": self.options.wikitext_detokenize,
            "whole_files": self.whole_files,
            "short_seq_prob": self.short_seq_prob,
            "seed": self.seed,
            "reference_remainder": not self.keep_all,
        }

    def reading(self, spool: Path) -> Reading:
        """See `Recipe`."""
        return Reading(columns=(self.options.key,), whole_files=self.whole_files, spool=spool)

    def encoder(self, split: str) -> Callable[[], Encoder]:
        """See `Recipe`."""
        return self.options.open

    def assembler(self, made: int) -> Packer:
        """See `Recipe`."""
        return Packer(
            self.length,
            end_of_text(self.options.tokenizer),
            short_seq_prob=self.short_seq_prob,
            seed=self.seed,
            made=made,
            keep_all=self.keep_all,
        )
