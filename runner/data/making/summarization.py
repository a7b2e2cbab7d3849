"""Make one example of each article and its summary.

    ids     [EOT] article [SEP] abstract       padded with end-of-text
    labels  article [EOT] abstract [EOT]

The mask is 1 where the label is a token of the abstract or the end-of-text after it, so that
only the summary is learned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gptj_model.errors import DataFault, UsageError
from runner.data.making.documents.document import Form, Problem, Raw, Reading, pick
from runner.data.making.encoding import (
    TOO_LONG,
    Chunk,
    Encoded,
    Encoder,
    parse_object,
    problem,
)
from runner.data.making.long_line import Damaged, json_kind, names
from runner.data.making.sources import TEST
from runner.data.making.tokenizer import SpecialNames, end_of_text, facts, loaded, settings
from runner.data.reading.example import parse_bytes
from runner.data.tokenizing.backend import (
    GIGATOKEN,
    Backend,
    TextTokenizer,
    TokensDiffer,
    choose,
    tokens_differ,
)

#: Separator between article and abstract: an id of GPT-J's vocabulary that no text uses.
SEPARATOR_ID = 50257
#: Column names in order of preference: of .bin files, of the public data set, and the plain name.
ARTICLE = "article"
ABSTRACT = "abstract|highlights|summary"

#: Token ids of a text.
Ids = Sequence[int] | np.ndarray

# Reasons for leaving a pair out, as the counts name them.
EMPTY = "with an empty side"
LONGER = "with an abstract longer than the article"


def example(article: Ids, abstract: Ids, length: int, *, end: int) -> np.ndarray:
    """Return ids, mask and labels of a pair that fits, int32 of shape (3, length)."""
    block = np.full((3, length), end, np.int32)
    at, last = len(article) + 1, len(article) + len(abstract) + 1
    block[1] = 0
    block[0, 1:at] = block[2, : at - 1] = article
    block[0, at] = SEPARATOR_ID
    block[0, at + 1 : last + 1] = block[2, at:last] = abstract
    block[1, at : last + 1] = 1
    return block


def tokens_needed(article: Ids, abstract: Ids) -> int:
    """Return the smallest max_sequence_length that holds the whole pair."""
    return len(article) + len(abstract) + 2


def pair(item: Raw | Problem, article: str, abstract: str) -> tuple[str, str]:
    """Return article and abstract of a document, given the names of its columns.

    Raises:
        Damaged: the document is malformed, or lacks one of the two.
    """
    if isinstance(item, Problem):
        raise Damaged(item.what)
    if item.form is Form.EXAMPLE:
        return _of_example(item.data)
    if item.form is not Form.JSON:
        raise Damaged(f"is {item.form.value}, expected an article and its summary")
    values = parse_object(item.data)
    if not isinstance(values, dict):
        raise Damaged(f"holds {json_kind(values)}, expected an object")
    return _text(values, article), _text(values, abstract)


def _text(values: dict[str, Any], group: str) -> str:
    try:
        text = pick(values, group)
    except KeyError as e:
        raise Damaged(
            f"has no {e.args[0]}, found {names(values)}",
            hint="name the keys with --article-column and --summary-column",
        ) from None
    if not isinstance(text, str):
        name = group.replace("|", " or ")
        raise Damaged(f"{name} is {json_kind(text)}, expected a string")
    return text


def _of_example(data: bytes) -> tuple[str, str]:
    try:
        features = parse_bytes(data)
        article, abstract = (features[name].decode("utf-8") for name in ("article", "abstract"))
    except KeyError as e:
        raise Damaged(f"has no bytes {e.args[0]!r}") from None
    except UnicodeDecodeError as e:
        raise Damaged(f"is not UTF-8: {e.reason} at {e.start}") from None
    except ValueError as e:
        raise Damaged(f"is not a tf.train.Example: {e}") from None
    return article, abstract


@dataclass(frozen=True, kw_only=True, slots=True)
class PairOptions:
    """How pairs become examples."""

    tokenizer: Path
    length: int
    allow_special: bool = False
    """Read the name of a special token in a text as that token instead of as text."""
    article: str = ARTICLE
    abstract: str = ABSTRACT
    truncate_article: bool = False
    """Shorten the article of a pair that is too long instead of leaving the pair out."""
    compare_bytes: bool = False
    """Compare abstract and article by bytes, as the reference does, instead of by tokens."""
    allow_longer: bool = False
    """Keep a pair whose abstract is longer than its article."""
    test: bool = False
    """Treat the pairs as a test set: use every pair, and use it whole."""

    def open(self) -> Encoder:
        """Return an encoder with these options."""
        return PairEncoder(self, self.backend)

    @property
    def backend(self) -> Backend:
        """Library that turns texts into tokens."""
        return choose(settings(self.tokenizer))


class PairEncoder:
    """Turns each pair into an example, unless a rule leaves the pair out.

    Args:
        options: how pairs become examples.
        backend: library that turns texts into tokens; it does not change them.

    Raises:
        FileFault: the tokenizer does not exist or cannot be read.
        UsageError: the vocabulary has no id for the separator.
    """

    def __init__(self, options: PairOptions, backend: Backend) -> None:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # the encoder runs in several processes instead
        self._options = options
        tokenizer = loaded(options.tokenizer, options.allow_special)
        self._backend = backend
        self._tokens = TextTokenizer(tokenizer, backend)
        self._end = end_of_text(options.tokenizer)
        self._names = SpecialNames(tokenizer)
        if (size := tokenizer.get_vocab_size()) <= SEPARATOR_ID:
            raise UsageError(
                f"{options.tokenizer}: has {size} tokens, expected GPT-J's 50400: "
                f"{SEPARATOR_ID} separates article and abstract",
                hint="use GPT-J's own tokenizer",
            )

    def __call__(self, chunk: Chunk) -> Encoded:
        """Return the examples of a chunk, int32 of shape (examples, 3, length).

        Raises:
            DataFault: a pair of a test set does not fit, or the backend gives other tokens than
                `tokenizers` for a text.
        """
        found = Encoded(np.empty((0, 3, self._options.length), np.int32))
        pairs: list[tuple[Raw, str, str]] = []
        for item in chunk:
            try:
                both = pair(item, self._options.article, self._options.abstract)
            except Damaged as e:
                found.problems.append(problem(item, e))
            else:
                assert isinstance(item, Raw)
                pairs.append((item, *both))
        texts = [text for _, *both in pairs for text in both]
        try:
            ids = iter(self._tokens.encode(texts))
        except TokensDiffer as e:
            raise tokens_differ(pairs[e.number // 2][0].where, self._backend) from None
        examples = []
        for item, article, abstract in pairs:
            found.documents += 1
            sizes = len(article.encode()), len(abstract.encode())
            found.bytes += sum(sizes)
            found.special_names += self._names.count(article) + self._names.count(abstract)
            made = self._example(item, next(ids), next(ids), sizes, found)
            if made is not None:
                examples.append(made)
        if examples:
            found.units = np.stack(examples)
        return found

    def _example(
        self,
        item: Raw,
        article: np.ndarray,
        abstract: np.ndarray,
        sizes: tuple[int, int],
        found: Encoded,
    ) -> np.ndarray | None:
        options = self._options
        needed = tokens_needed(article, abstract)
        if options.test:
            if needed > options.length:
                raise DataFault(
                    f"{item.where}: needs {needed} tokens, max_sequence_length is "
                    f"{options.length}; the pairs of a test set are never shortened or left out",
                    hint=f"set --max-sequence-length {needed} or more",
                )
        else:
            if rule := self._rule(article, abstract, sizes):
                found.left_out[rule] = found.left_out.get(rule, 0) + 1
                return None
            article = article[: options.length - len(abstract) - 2]
        found.tokens += tokens_needed(article, abstract)
        return example(article, abstract, options.length, end=self._end)

    @property
    def needs_no_process(self) -> bool:
        """See `ThreadedEncoder`."""
        return self._backend.name == GIGATOKEN

    def _rule(
        self, article: np.ndarray, abstract: np.ndarray, sizes: tuple[int, int]
    ) -> str | None:
        """Return why a pair is left out, or None; `sizes` are those of the texts in bytes."""
        if not len(article) or not len(abstract):
            return EMPTY
        ours = len(article), len(abstract)
        of_article, of_abstract = sizes if self._options.compare_bytes else ours
        if of_abstract > of_article and not self._options.allow_longer:
            return LONGER
        # A shortened article keeps at least one token.
        least = article[:1] if self._options.truncate_article else article
        return TOO_LONG if tokens_needed(least, abstract) > self._options.length else None


class Pairs:
    """Passes examples on unchanged; see `runner.data.making.build.Assembler`."""

    def __init__(self, length: int) -> None:
        self._pending = np.empty((0, 3, length), np.int32)

    @property
    def left(self) -> int:
        """Number of examples that have not been returned yet."""
        return len(self._pending)

    def add(self, units: np.ndarray) -> None:
        """Append examples."""
        self._pending = np.concatenate((self._pending, units))

    def cut(self, most: int) -> np.ndarray:
        """Return at most `most` examples."""
        block, self._pending = self._pending[:most], self._pending[most:]
        return block

    def finish(self) -> np.ndarray:
        """Return an empty block, because every example is complete."""
        return self._pending[:0]


@dataclass(frozen=True, kw_only=True, slots=True)
class SummarizationRecipe:
    """Examples of articles and summaries; see `runner.data.making.build.Recipe`."""

    options: PairOptions

    @property
    def length(self) -> int:
        """See `Recipe`."""
        return self.options.length

    @property
    def arguments(self) -> dict[str, Any]:
        """See `Recipe`."""
        return {
            "kind": "summarization",
            "max_sequence_length": self.length,
            **facts(self.options.tokenizer),
            "allow_special": self.options.allow_special,
            "article": self.options.article,
            "abstract": self.options.abstract,
            "truncate_article": self.options.truncate_article,
            "compare_bytes": self.options.compare_bytes,
            "allow_longer_abstracts": self.options.allow_longer,
            "test": self.options.test,
        }

    def reading(self, spool: Path) -> Reading:
        """See `Recipe`."""
        return Reading(columns=(self.options.article, self.options.abstract), spool=spool)

    def encoder(self, split: str) -> Callable[[], Encoder]:
        """See `Recipe`."""
        test = self.options.test or split == TEST
        # The backend is chosen here, once for all processes.
        return partial(PairEncoder, replace(self.options, test=test), self.options.backend)

    @property
    def backend(self) -> Backend:
        """Library that turns texts into tokens."""
        return self.options.backend

    def assembler(self, made: int) -> Pairs:
        """See `Recipe`."""
        return Pairs(self.length)
