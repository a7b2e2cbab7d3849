"""Articles and their summaries into examples, one each.

    ids     [EOT] article [SEP] abstract       padded with end-of-text
    labels  article [EOT] abstract [EOT]

The mask is 1 where the label is a token of the abstract or the end-of-text after it, so that
only the summary is learnt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptj_model.errors import DataFault, UsageError
from runner.data.making.encoding import Chunk, Encoded, Encoder, parse_object, problem
from runner.data.making.long_line import Damaged, json_kind
from runner.data.making.sources import TEST, Form, Problem, Raw, Reading, pick
from runner.data.making.tokenizer import end_of_text, facts, loaded
from runner.data.reading.example import parse_bytes

#: A slot of GPT-J's vocabulary that no text uses, between article and abstract.
SEPARATOR_ID = 50257
#: Names of the columns, by preference: the .bin files', the public data set's, and the plain one.
ARTICLE = "article"
ABSTRACT = "abstract|highlights|summary"

# Why a pair is left out.
EMPTY = "with an empty side"
LONGER = "with an abstract longer than the article"
TOO_LONG = "too long"


def example(
    article: Sequence[int], abstract: Sequence[int], length: int, *, end: int
) -> np.ndarray:
    """Ids, mask and labels of a pair that fits: int32 of shape (3, length)."""
    block = np.full((3, length), end, np.int32)
    ids = [end, *article, SEPARATOR_ID, *abstract]
    labels = [*article, end, *abstract, end]
    block[0, : len(ids)] = ids
    block[1] = 0
    block[1, len(article) + 1 : len(ids)] = 1
    block[2, : len(labels)] = labels
    return block


def tokens_needed(article: Sequence[int], abstract: Sequence[int]) -> int:
    """The least max_sequence_length that takes a pair whole."""
    return len(article) + len(abstract) + 2


def pair(item: Raw | Problem, article: str, abstract: str) -> tuple[str, str]:
    """The two texts of a document, under these names; see `ARTICLE`.

    Raises:
        Damaged: it is no such document.
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
        raise Damaged(f"has no {e.args[0]}") from None
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
    """How a pair becomes an example."""

    tokenizer: Path
    length: int
    allow_special: bool = False
    """Read a special token's name in a text as that token, not as text."""
    article: str = ARTICLE
    abstract: str = ABSTRACT
    truncate_article: bool = False
    """Shorten the article of a pair that is too long, instead of leaving the pair out."""
    compare_bytes: bool = False
    """Leave out an abstract of more bytes than its article, as the reference does, not of more
    tokens."""
    test: bool = False
    """Take every pair, and whole."""

    def open(self) -> Encoder:
        """What does it."""
        return PairEncoder(self)


class PairEncoder:
    """Each pair's example, unless a rule leaves it out.

    Raises:
        FileFault: the tokenizer is not there, or is none.
        UsageError: its vocabulary has no slot for the separator.
    """

    def __init__(self, options: PairOptions) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes do it instead
        self._options = options
        self._tokenizer = loaded(options.tokenizer, options.allow_special)
        self._end = end_of_text(options.tokenizer)
        if (size := self._tokenizer.get_vocab_size()) <= SEPARATOR_ID:
            raise UsageError(
                f"{options.tokenizer}: has {size} tokens, expected GPT-J's 50400: "
                f"{SEPARATOR_ID} separates article and abstract",
                hint="name GPT-J's own tokenizer",
            )

    def __call__(self, chunk: Chunk) -> Encoded:
        """Examples, int32 of shape (examples, 3, length).

        Raises:
            DataFault: a pair of a test set does not fit.
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
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = iter([encoding.ids for encoding in encodings])
        examples = []
        for item, article, abstract in pairs:
            found.documents += 1
            sizes = len(article.encode()), len(abstract.encode())
            found.bytes += sum(sizes)
            made = self._example(item, next(ids), next(ids), sizes, found)
            if made is not None:
                examples.append(made)
        if examples:
            found.units = np.stack(examples)
        return found

    def _example(
        self,
        item: Raw,
        article: list[int],
        abstract: list[int],
        sizes: tuple[int, int],
        found: Encoded,
    ) -> np.ndarray | None:
        options = self._options
        needed = tokens_needed(article, abstract)
        if options.test:
            if needed > options.length:
                raise DataFault(
                    f"{item.where}: needs {needed} tokens, max_sequence_length is "
                    f"{options.length}; a test set is neither shortened nor thinned out",
                    hint=f"--max-sequence-length {needed} or more",
                )
        else:
            if rule := self._rule(article, abstract, sizes):
                found.left_out[rule] = found.left_out.get(rule, 0) + 1
                return None
            article = article[: options.length - len(abstract) - 2]
        found.tokens += tokens_needed(article, abstract)
        return example(article, abstract, options.length, end=self._end)

    def _rule(self, article: list[int], abstract: list[int], sizes: tuple[int, int]) -> str | None:
        """Why a pair is left out; None when it is not. Sizes are in bytes."""
        if not article or not abstract:
            return EMPTY
        ours = len(article), len(abstract)
        of_article, of_abstract = sizes if self._options.compare_bytes else ours
        if of_abstract > of_article:
            return LONGER
        # Of an article that is shortened something must be left.
        least = article[:1] if self._options.truncate_article else article
        return TOO_LONG if tokens_needed(least, abstract) > self._options.length else None


class Pairs:
    """Examples as they come. See `runner.data.making.build.Assembler`."""

    def __init__(self, length: int) -> None:
        self._pending = np.empty((0, 3, length), np.int32)

    @property
    def left(self) -> int:
        """Examples that are not taken yet."""
        return len(self._pending)

    def add(self, units: np.ndarray) -> None:
        """Append examples."""
        self._pending = np.concatenate((self._pending, units))

    def cut(self, most: int) -> np.ndarray:
        """At most so many examples."""
        block, self._pending = self._pending[:most], self._pending[most:]
        return block

    def finish(self) -> np.ndarray:
        """Nothing: no example waits for another."""
        return self._pending[:0]


@dataclass(frozen=True, kw_only=True, slots=True)
class SummarizationRecipe:
    """Pairs. See `runner.data.making.build.Recipe`."""

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
            "test": self.options.test,
        }

    def reading(self, spool: Path) -> Reading:
        """See `Recipe`."""
        return Reading(columns=(self.options.article, self.options.abstract), spool=spool)

    def encoder(self, split: str) -> Callable[[], Encoder]:
        """See `Recipe`."""
        test = self.options.test or split == TEST
        return replace(self.options, test=test).open

    def assembler(self, made: int) -> Pairs:
        """See `Recipe`."""
        return Pairs(self.length)
