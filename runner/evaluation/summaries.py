"""A fine-tune for summarization judged: summaries generated, and scored by ROUGE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from gptj_model.errors import DataFault
from runner.data.making.long_line import Damaged
from runner.data.making.sources import Reading, read
from runner.data.making.summarization import ABSTRACT, ARTICLE, SEPARATOR_ID, pair

METRICS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Summary:
    """One article's summaries, and the scores of the generated one, F-measures in percent."""

    found: str
    expected: str
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompting:
    """How an article becomes a prompt, as the records of the fine-tune have it."""

    tokenizer: Tokenizer
    begin: int
    """The token that a prompt begins with."""
    longest: int
    """Tokens that a prompt may have."""
    truncate_article: bool = False
    """Shorten an article that is too long, instead of refusing it."""

    def __call__(self, article: str, where: str) -> list[int]:
        """[EOT] article [SEP].

        Raises:
            DataFault: it is too long.
        """
        ids = self.tokenizer.encode(article, add_special_tokens=False).ids
        if (needed := len(ids) + 2) > self.longest and not self.truncate_article:
            raise DataFault(
                f"{where}: the article makes a prompt of {needed} tokens, at most {self.longest} "
                "leave room for the summary; a test set is neither shortened nor thinned out",
                hint="generate fewer with --max-new-tokens, or shorten with --truncate-article",
            )
        return [self.begin, *ids[: self.longest - 2], SEPARATOR_ID]


def read_pairs(
    paths: Sequence[Path], spool: Path, *, article: str = ARTICLE, summary: str = ABSTRACT
) -> Iterator[tuple[str, str, str]]:
    """Place, article and summary of each pair of a test set.

    Raises:
        DataFault: one is damaged; with its place.
    """
    for item in read(paths, Reading(columns=(article, summary), spool=spool)):
        try:
            texts = pair(item, article, summary)
        except Damaged as e:
            raise DataFault(
                f"{item.where}: {e}", hint="mend it: a test set is taken whole"
            ) from None
        yield item.where, *texts


def summarize(
    pairs: Iterable[tuple[str, str, str]],
    prompting: Prompting,
    search: Callable[[Sequence[int]], list[int]],
) -> Iterator[Summary]:
    """Generate and score one summary after the other.

    Args:
        pairs: place, article and summary.
        prompting: articles into ids.
        search: ids into those that follow.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(METRICS, use_stemmer=True)
    for where, article, expected in pairs:
        ids = search(prompting(article, where))
        found = prompting.tokenizer.decode(ids).strip()
        scores = scorer.score(expected, found)
        yield Summary(found, expected, {m: 100 * scores[m].fmeasure for m in METRICS})
