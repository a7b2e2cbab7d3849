"""Make packed examples of text: one stream of documents, each followed by one end-of-text."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptj_model.errors import DataFault
from runner.data.making import pieces
from runner.data.making.documents.document import Form, Problem, Raw, Reading
from runner.data.making.encoding import Chunk, Encoded, Encoder, decode, parse_object, problem
from runner.data.making.long_line import Damaged, names, string_of
from runner.data.making.packing import Packer
from runner.data.making.tokenizer import (
    SpecialNames,
    end_of_text,
    facts,
    loaded,
    may_cut,
    settings,
)
from runner.data.tokenizing.backend import (
    GIGATOKEN,
    Backend,
    TextTokenizer,
    TokensDiffer,
    choose,
    tokens_differ,
)

#: Number of characters from which a text is tokenized in pieces.
_LONG_TEXT = 2**18


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
        return TextEncoder(self, self.backend)

    @property
    def backend(self) -> Backend:
        """Library that turns texts into tokens."""
        return choose(settings(self.tokenizer))


class TextEncoder:
    """Turns documents into tokens, each document followed by one end-of-text.

    Args:
        options: how text becomes tokens.
        backend: library that turns texts into tokens; it does not change them.

    Raises:
        FileFault: the tokenizer does not exist or cannot be read.
    """

    def __init__(self, options: TextOptions, backend: Backend) -> None:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # the encoder runs in several processes instead
        self._options = options
        tokenizer = loaded(options.tokenizer, options.allow_special)
        self._backend = backend
        self._tokens = TextTokenizer(tokenizer, backend)
        self._end = np.array([end_of_text(options.tokenizer)], self._tokens.dtype)
        self._may_cut = may_cut(settings(options.tokenizer))
        self._names = SpecialNames(tokenizer)

    def __call__(self, chunk: Chunk) -> Encoded:
        """Return the tokens of a chunk, int32 or uint16.

        Raises:
            DataFault: the backend gives other tokens than `tokenizers` for a document.
        """
        found = Encoded(np.empty(0, self._tokens.dtype))
        texts: list[str] = []
        whose: list[tuple[Raw, bool]] = []  # each text's document, and whether it ends there
        for item in chunk:
            try:
                text = self._text(item)
            except Damaged as e:
                found.problems.append(problem(item, e))
                continue
            assert isinstance(item, Raw)
            found.documents += not item.more
            cut = pieces.cut(text, _LONG_TEXT) if self._may_cut else (text,)
            texts += cut
            whose += [(item, False)] * (len(texts) - len(whose))
            whose[-1] = (item, not item.more)
        try:
            tokens = self._tokens.encode(texts)
        except TokensDiffer as e:
            raise tokens_differ(whose[e.number][0].where, self._backend) from None
        parts: list[np.ndarray] = [found.units]
        for text, ids, (_, ends) in zip(texts, tokens, whose, strict=True):
            parts += (ids, self._end) if ends else (ids,)
            found.bytes += len(text) if text.isascii() else len(text.encode())
            found.special_names += self._names.count(text)
        found.units = np.concatenate(parts)
        found.tokens = len(found.units)
        return found

    @property
    def needs_no_process(self) -> bool:
        """See `ThreadedEncoder`."""
        options = self._options
        rewrites = options.ftfy or options.wikitext_detokenize
        return self._backend.name == GIGATOKEN and not rewrites

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
        # The backend is chosen here, once for all processes.
        return partial(TextEncoder, self.options, self.options.backend)

    @property
    def backend(self) -> Backend:
        """Library that turns texts into tokens."""
        return self.options.backend

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
