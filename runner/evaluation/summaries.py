"""Evaluate a fine-tune for summarization: generate summaries and score them by ROUGE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from gptj_model.errors import DataFault
from runner.data.making.documents.document import Reading
from runner.data.making.long_line import Damaged
from runner.data.making.sources import read
from runner.data.making.summarization import ABSTRACT, ARTICLE, SEPARATOR_ID, pair

METRICS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Summary:
    """Generated and expected summary of one article."""

    found: str
    """Generated summary."""
    expected: str
    """Summary of the test set."""
    scores: dict[str, float]
    """F-measures in percent, by metric."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompting:
    """Turns an article into a prompt in the form of the training records."""

    tokenizer: Tokenizer
    begin: int
    """Id of the token that a prompt begins with."""
    longest: int
    """Largest number of tokens of a prompt."""
    truncate_article: bool = False
    """Shorten an article that is too long instead of raising."""

    def __call__(self, article: str, where: str) -> list[int]:
        """Return the ids of [EOT] article [SEP].

        Raises:
            DataFault: the article is too long; with `where`.
        """
        ids = self.tokenizer.encode(article, add_special_tokens=False).ids
        if (needed := len(ids) + 2) > self.longest and not self.truncate_article:
            raise DataFault(
                f"{where}: the article makes a prompt of {needed} tokens, at most {self.longest} "
                "leave room for the summary; the pairs of a test set are never left out",
                hint="choose fewer --max-new-tokens, or shorten articles with --truncate-article",
            )
        return [self.begin, *ids[: self.longest - 2], SEPARATOR_ID]


def read_pairs(
    paths: Sequence[Path], spool: Path, *, article: str = ARTICLE, summary: str = ABSTRACT
) -> Iterator[tuple[str, str, str]]:
    """Yield place, article and summary of each pair of a test set.

    Raises:
        DataFault: a pair is malformed; with its place.
    """
    for item in read(paths, Reading(columns=(article, summary), spool=spool)):
        try:
            texts = pair(item, article, summary)
        except Damaged as e:
            raise DataFault(
                f"{item.where}: {e}", hint="fix the pair: a test set is used whole"
            ) from None
        yield item.where, *texts


def summarize(
    pairs: Iterable[tuple[str, str, str]],
    prompting: Prompting,
    search: Callable[[Sequence[int]], list[int]],
) -> Iterator[Summary]:
    """Generate and score one summary after another.

    Args:
        pairs: place, article and expected summary of each pair.
        prompting: function from an article to the ids of its prompt.
        search: function from the ids of a prompt to the generated ids.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(METRICS, use_stemmer=True)
    for where, article, expected in pairs:
        ids = search(prompting(article, where))
        found = prompting.tokenizer.decode(ids).strip()
        scores = scorer.score(expected, found)
        yield Summary(found, expected, {m: 100 * scores[m].fmeasure for m in METRICS})
