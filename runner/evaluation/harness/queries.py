"""Texts of the harness's requests as queries of token ids."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from tokenizers import Tokenizer
from typing_extensions import override

from gptj_model.decoding.likelihood import Query
from gptj_model.errors import DataFault


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """The tokenizer of a model, and its tokens with a meaning."""

    tokenizer: Tokenizer
    end: int
    """Id of the token that ends a text."""
    prefix: int
    """Id of the token that stands before a text without context."""
    ends: frozenset[int]
    """Ids that each end a generated text."""
    positions: int
    """Largest number of tokens that the model reads at once."""
    vocab_size: int
    """Number of tokens that the model knows."""


class QueryModel(TemplateLM):
    """The harness's view of what answers queries: log-likelihoods of texts become queries here.

    Args:
        tokens: tokenizer of the model, with its tokens.

    Attributes:
        shortened: number of requests whose beginning was dropped, because they are longer than the
            model's context.
    """

    def __init__(self, tokens: Tokens) -> None:
        super().__init__()
        self._tokens = tokens
        self.shortened = 0

    @abstractmethod
    def _likelihoods(self, queries: Sequence[Query], what: str) -> Iterable[tuple[float, bool]]:
        """Return log-probability and greediness of each query; `what` names their kind."""

    def _summed(self, queries: Sequence[Sequence[Query]], what: str) -> list[tuple[float, bool]]:
        """Return log-probability and greediness of each request from its queries."""
        found = iter(self._likelihoods([query for own in queries for query in own], what))
        answers: list[tuple[float, bool]] = []
        for own in queries:
            parts = [next(found) for _ in own]
            answers.append((sum(logprob for logprob, _ in parts), all(hit for _, hit in parts)))
        return answers

    @property
    @override
    def eot_token_id(self) -> int:
        return self._tokens.end

    @property
    @override
    def prefix_token_id(self) -> int:
        return self._tokens.prefix

    @override
    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        tokenizer = self._tokens.tokenizer
        if add_special_tokens is None:
            begin = tokenizer.decode([self._tokens.prefix], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, begin)
        try:
            ids = tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):
            raise DataFault(
                f"a request holds half of a surrogate pair, expected Unicode text: {string[:80]!r}"
            ) from None
        if max(ids, default=0) >= self._tokens.vocab_size:
            raise DataFault(
                f"the tokenizer gives token {max(ids)}, expected one of the model's "
                f"{self._tokens.vocab_size:,} tokens",
                hint="put the tokenizer that the model was trained with beside its weights",
            )
        return ids

    @override
    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        for request in requests:
            _, continuation = arguments(request)
            if not continuation:
                raise unusable(request, "an empty continuation, expected at least one token")
        return super().loglikelihood(requests, disable_tqdm=True)

    @override
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._summed([[self._query(*request)] for request in requests], "choices")

    def _query(self, texts: Any, context: list[int], continuation: list[int]) -> Query:
        longest = self._tokens.positions
        if not 0 < len(continuation) <= longest:
            raise DataFault(
                f"the continuation {texts[1][:80]!r} has {len(continuation)} tokens, expected 1 to "
                f"the model's {longest}"
            )
        ids = context + continuation
        self.shortened += len(ids) > longest + 1
        return Query(tuple(ids[-(longest + 1) :]), len(continuation))

    @override
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows = [self._windows(request.args[0]) for request in requests]
        return [logprob for logprob, _ in self._summed(windows, "windows of texts")]

    def _windows(self, text: str) -> list[Query]:
        pairs = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self._tokens.prefix,
            max_seq_len=self._tokens.positions,
            context_len=1,
        )
        disjoint = map(utils.make_disjoint_window, pairs)
        return [Query((*context, *scored), len(scored)) for context, scored in disjoint]


def arguments(request: Instance) -> tuple[Any, ...]:
    """Return the texts of a request, which the harness annotates as if there were one at most."""
    return request.args


def unusable(request: Instance, found: str) -> DataFault:
    """Return the error about a request that the model cannot answer; `found` says why."""
    shown = json.dumps(request.args, default=str, ensure_ascii=False)
    return DataFault(
        f"task {request.task_name}, document {request.doc_id}: has {found}; its request is "
        f"{shown[:200]}"
    )
