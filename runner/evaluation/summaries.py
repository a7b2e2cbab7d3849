"""Evaluate a fine-tune for summarization: generate summaries and score them by ROUGE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer

from gptj_model.errors import DataFault
from runner.data.making.documents.document import Form, Problem, Raw, Reading
from runner.data.making.encoding import parse_object
from runner.data.making.long_line import Damaged, json_kind
from runner.data.making.sources import read
from runner.data.making.summarization import SEPARATOR_ID, pair

T = TypeVar("T")

METRICS = ("rouge1", "rouge2", "rougeL")
#: Number of batches that are read ahead, so that prompts of like length are in one batch.
_AHEAD = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """An article of a test set, and its summary."""

    where: str
    """Place of the pair in its file."""
    article: str
    summary: str
    instruction: str | None
    """What the pair asks for, if it has an instruction."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Generated and expected summary of one article."""

    found: str
    """Generated summary."""
    expected: str
    """Summary of the test set."""
    scores: dict[str, float]
    """F-measures in percent, by metric."""


@dataclass(kw_only=True, slots=True)
class Prompting:
    """Turns a pair into a prompt, and counts those that it shortens."""

    encode: Callable[[Pair], list[int]]
    """Return the ids of the prompt of a pair, however long."""
    longest: int
    """Largest number of tokens of a prompt."""
    shorten: Callable[[Pair, list[int]], list[int]] | None = None
    """Return the ids of a prompt that is too long, shortened; None refuses it."""
    shortened: int = 0
    """Number of prompts that were shortened."""

    def __call__(self, pair: Pair) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            DataFault: the prompt is too long and is not to be shortened; with its place.
        """
        ids = self.encode(pair)
        if len(ids) <= self.longest:
            return ids
        if not self.shorten:
            raise DataFault(
                f"{pair.where}: the article makes a prompt of {len(ids)} tokens, at most "
                f"{self.longest} leave room for the summary; the pairs of a test set are never "
                "left out",
                hint="choose fewer --max-new-tokens, or shorten articles with --truncate-article",
            )
        self.shortened += 1
        return self.shorten(pair, ids)


def separated(tokenizer: Tokenizer, begin: int, longest: int, *, truncate: bool) -> Prompting:
    """Return prompts in the form of the training records, [EOT] article [SEP].

    Args:
        tokenizer: tokenizer of the model.
        begin: id of [EOT].
        longest: largest number of tokens of a prompt.
        truncate: whether articles that are too long are shortened.
    """

    def encode(pair: Pair) -> list[int]:
        ids = tokenizer.encode(pair.article, add_special_tokens=False).ids
        return [begin, *ids, SEPARATOR_ID]

    def shorten(pair: Pair, ids: list[int]) -> list[int]:
        return [*ids[: longest - 1], SEPARATOR_ID]

    return Prompting(encode=encode, longest=longest, shorten=shorten if truncate else None)


def rendered(
    tokenizer: Tokenizer, encode: Callable[[Pair], list[int]], longest: int, *, truncate: bool
) -> Prompting:
    """Return prompts that a template renders.

    Args:
        tokenizer: tokenizer of the model.
        encode: function from a pair to the ids of its prompt.
        longest: largest number of tokens of a prompt.
        truncate: whether articles that are too long are shortened, and the template stays whole.
    """

    def shorten(pair: Pair, ids: list[int]) -> list[int]:
        kept = tokenizer.encode(pair.article, add_special_tokens=False).ids
        while (excess := len(ids) - longest) > 0:
            if not kept:
                raise DataFault(
                    f"{pair.where}: the prompt has {len(ids)} tokens without its article, at most "
                    f"{longest} leave room for the summary",
                    hint="choose fewer --max-new-tokens, or a shorter template",
                )
            kept = kept[: max(0, len(kept) - excess)]
            ids = encode(replace(pair, article=tokenizer.decode(kept)))
        return ids

    return Prompting(encode=encode, longest=longest, shorten=shorten if truncate else None)


def read_pairs(
    paths: Sequence[Path], spool: Path, *, article: str, summary: str, instructions: bool
) -> Iterator[Pair]:
    """Yield each pair of a test set.

    Args:
        paths: its files.
        spool: folder for documents that are too long for memory.
        article: key of the articles, or several separated by `|`.
        summary: key of the summaries, likewise.
        instructions: whether pairs may have an instruction.

    Raises:
        DataFault: a pair is malformed; with its place.
    """
    reading = Reading(columns=(article, summary), rows=instructions, spool=spool)
    for item in read(paths, reading):
        try:
            texts = pair(item, article, summary)
            instruction = _instruction(item) if instructions else None
        except Damaged as e:
            raise DataFault(
                f"{item.where}: {e}", hint="fix the pair: a test set is used whole"
            ) from None
        article_text, summary_text = texts
        yield Pair(
            where=item.where, article=article_text, summary=summary_text, instruction=instruction
        )


def _instruction(item: Raw | Problem) -> str | None:
    if not isinstance(item, Raw) or item.form is not Form.JSON:
        return None
    values = parse_object(item.data)
    found = values.get("instruction") if isinstance(values, dict) else None
    if found is not None and not isinstance(found, str):
        raise Damaged(f"'instruction' is {json_kind(found)}, expected a string")
    return found


def summarize(
    pairs: Iterable[Pair],
    prompting: Callable[[Pair], list[int]],
    search: Callable[[Sequence[list[int]]], list[list[int]]],
    tokenizer: Tokenizer,
    batch_size: int,
) -> Iterator[Summary]:
    """Generate summaries in batches, and yield them with their scores in the order of the pairs.

    Args:
        pairs: the test set.
        prompting: function from a pair to the ids of its prompt.
        search: function from the ids of several prompts to the generated ids of each.
        tokenizer: tokenizer of the model.
        batch_size: number of summaries that are generated together.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(METRICS, use_stemmer=True)
    for ahead in batched(pairs, _AHEAD * batch_size):
        prompts = [prompting(pair) for pair in ahead]
        order = sorted(range(len(ahead)), key=lambda n: -len(prompts[n]))
        found: dict[int, str] = {}
        for numbers in batched(order, batch_size):
            for n, ids in zip(numbers, search([prompts[n] for n in numbers]), strict=True):
                found[n] = tokenizer.decode(ids).strip()
        for n, given in enumerate(ahead):
            scores = scorer.score(given.summary, found[n])
            percent = {m: 100 * scores[m].fmeasure for m in METRICS}
            yield Summary(found[n], given.summary, percent)


def batched(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    """Yield the items in tuples of this size, the last one maybe shorter."""
    left = iter(items)
    while group := tuple(islice(left, size)):
        yield group
