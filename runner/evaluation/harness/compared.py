"""Requests of the harness's tasks as data, and the harness's figures of answers to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from lm_eval.api.instance import Instance
from typing_extensions import override

from gptj_convert.verification.levels.task_requests import Metrics, TaskRequest, TaskRequests
from gptj_model.decoding.likelihood import Likelihood, Query
from gptj_model.errors import DataFault, UsageError
from runner.evaluation.harness.queries import QueryModel, Tokens, arguments
from runner.evaluation.harness.tasks import Tasks

#: Largest number of characters of a request that are kept for people.
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Collected:
    """Every log-likelihood that tasks ask for."""

    requests: TaskRequests
    shortened: int
    """Number of requests whose beginning was dropped, because they are longer than the model's
    context."""


def collected(tasks: Tasks, tokens: Tokens, limit: int) -> Collected:
    """Return the requests of tasks.

    Args:
        tasks: tasks with their data.
        tokens: tokenizer and context of the model.
        limit: number of documents of each task; 0 means all.

    Raises:
        UsageError: a task asks for texts to be generated.
        DataFault: a task is not valid, or asks for nothing.
    """
    if tasks.generating:
        raise UsageError(
            f"{', '.join(tasks.generating)}: asks for generated texts, expected tasks that ask for "
            "log-likelihoods",
            hint="score each side by `gptj eval --task`; `--level generation` compares generated "
            "tokens",
        )
    model = _Model(tokens)
    tasks.run(model, limit, resamples=0)
    if not model.requests:
        raise DataFault(f"{', '.join(tasks.names)}: no log-likelihood of any text is asked for")

    def metrics(answers: Mapping[Query, Likelihood]) -> Metrics:
        results = tasks.run(_Model(tokens, answers), limit, resamples=0)["results"]
        return {
            task: {name: value for name, value in own.items() if isinstance(value, float)}
            for task, own in results.items()
        }

    limited = f", {limit:,} documents of each" if limit else ""
    source = f"lm-eval:{','.join(tasks.names)}{limited} (lm_eval {version('lm_eval')})"
    return Collected(
        TaskRequests(source=source, requests=list(model.requests.values()), metrics=metrics),
        model.shortened,
    )


class _Model(QueryModel):
    """Model that keeps the requests it is asked, and answers with likelihoods that are given.

    Args:
        tokens: tokenizer and context of the model.
        answers: likelihoods of all queries; None answers 0 to each.

    Attributes:
        requests: requests by task, document and choice.
    """

    def __init__(self, tokens: Tokens, answers: Mapping[Query, Likelihood] | None = None) -> None:
        super().__init__(tokens)
        self._answers = answers
        self._asked: Sequence[Instance] = ()
        self.requests: dict[tuple[str, int, int], TaskRequest] = {}

    @override
    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        self._asked = requests
        return super().loglikelihood(requests)

    @override
    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        self._asked = requests
        return super().loglikelihood_rolling(requests)

    @override
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        raise NotImplementedError("tasks that generate are refused before")

    @override
    def _summed(self, queries: Sequence[Sequence[Query]], what: str) -> list[tuple[float, bool]]:
        for instance, own in zip(self._asked, queries, strict=True):
            task, document = str(instance.task_name), int(instance.doc_id or 0)
            if own:  # an empty text has nothing to score
                self.requests[task, document, instance.idx] = TaskRequest(
                    task=task,
                    document=document,
                    choice=instance.idx,
                    shown=_shown(instance),
                    queries=tuple(own),
                )
        return super()._summed(queries, what)

    @override
    def _likelihoods(self, queries: Sequence[Query], what: str) -> Iterator[tuple[float, bool]]:
        for query in queries:
            if self._answers is None:
                yield 0.0, False
            else:
                found = self._answers[query]
                yield found.logprob, found.greedy


def _shown(instance: Instance) -> str:
    """Return the beginning of the text that is scored."""
    texts: tuple[Any, ...] = arguments(instance)
    return str(texts[-1])[:_SHOWN]
