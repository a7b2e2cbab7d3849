"""Requests of level tasks: texts of tasks, of which the last tokens are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from golden.prompts import questions
from gptj_model.config import GPTJConfig
from gptj_model.decoding.likelihood import Likelihood, Query

#: Figures of tasks, such as their accuracy, by task and by name of the figure.
Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRequest:
    """One log-likelihood that a task asks for."""

    task: str
    """Name of the task."""
    document: int
    """Number of the document in its task; several requests of one document are choices."""
    choice: int
    """Number of the request in its document."""
    shown: str
    """Beginning of the text, or ids of the tokens, that are scored, for people."""
    queries: tuple[Query, ...]
    """Queries whose log-likelihoods are added: one, or the windows of a long text."""

    def likelihood(self, of_query: Mapping[Query, Likelihood]) -> Likelihood:
        """Return the likelihood of the request from those of its queries."""
        parts = [of_query[query] for query in self.queries]
        return Likelihood(sum(p.logprob for p in parts), all(p.greedy for p in parts))


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRequests:
    """Requests that both sides answer."""

    source: str
    """Description of where the requests come from."""
    requests: Sequence[TaskRequest]
    metrics: Callable[[Mapping[Query, Likelihood]], Metrics]
    """Returns the figures that follow from the likelihoods of all queries."""


def built_in(config: GPTJConfig) -> TaskRequests:
    """Return requests that need neither network nor tokenizer: to choose the passage that follows
    another one, among passages of `golden.prompts`."""
    numbers: dict[str, int] = {}
    requests: list[TaskRequest] = []
    asked = questions(config)
    for question in asked:
        numbers[question.prompt] = document = numbers.get(question.prompt, -1) + 1
        requests += [
            TaskRequest(
                task=question.prompt,
                document=document,
                choice=n,
                shown=f"ids {' '.join(map(str, answer))}",
                queries=(Query((*question.context, *answer), len(answer)),),
            )
            for n, answer in enumerate(question.answers)
        ]
    return TaskRequests(
        source=f"built in: {len(asked)} passages to continue, as token ids",
        requests=requests,
        metrics=lambda found: _accuracy(requests, found),
    )


def chosen(likelihoods: Sequence[Likelihood]) -> int | bool:
    """Return the answer to a document: the number of its most likely choice, or of a single request
    whether its tokens are the most likely ones."""
    if len(likelihoods) == 1:
        return likelihoods[0].greedy
    return max(range(len(likelihoods)), key=lambda n: likelihoods[n].logprob)


def by_document(requests: Iterable[TaskRequest]) -> dict[tuple[str, int], list[TaskRequest]]:
    """Return the requests of each document, by task and number of the document."""
    found: dict[tuple[str, int], list[TaskRequest]] = {}
    for request in requests:
        found.setdefault((request.task, request.document), []).append(request)
    return found


def _accuracy(requests: Sequence[TaskRequest], found: Mapping[Query, Likelihood]) -> Metrics:
    """Return the share of documents of each task whose first choice is the most likely one."""
    hits: dict[str, list[bool]] = {}
    for (task, _), own in by_document(requests).items():
        right = chosen([request.likelihood(found) for request in own]) == 0
        hits.setdefault(task, []).append(right)
    return {task: {"acc": sum(own) / len(own)} for task, own in hits.items()}
