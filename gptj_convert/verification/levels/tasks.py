"""Level tasks: log-likelihoods that tasks ask for, request by request on both sides.

Every group of requests runs through both models block by block. Each token that is scored counts
for itself, so that a wrong one is not hidden by the others of its request.

Shape suffixes: B batch, T time, D hidden, N scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from golden.compare import over_spread
from golden.tolerances import LIKELIHOODS_OVER_LOGITS
from gptj_convert.checkpoint.open import Checkpoint
from gptj_convert.inspection.json_numbers import json_number
from gptj_convert.options import TASKS_LEVEL
from gptj_convert.resources.footprint import tasks_memory
from gptj_convert.streams.progress import Progress, Work
from gptj_convert.verification.evidence.verdict import Difference, LevelResult, Verdict
from gptj_convert.verification.levels.logits import common_dtype
from gptj_convert.verification.levels.task_requests import (
    Metrics,
    TaskRequest,
    TaskRequests,
    built_in,
    by_document,
    chosen,
)
from gptj_model.config import GPTJConfig
from gptj_model.decoding.likelihood import Batch, Likelihood, Query, batches, grouped
from gptj_model.errors import GptjError

if TYPE_CHECKING:
    from golden.reference import StreamedReference, TokenLikelihoods
    from gptj_model.streaming.forward import StreamedModel

#: Largest size in bytes of the hidden states of both sides that share one pass over the weights.
_STATES = 2**29
#: Largest number of texts that run at once.
_TEXTS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class _Compared:
    """One query on both sides."""

    found: Likelihood
    expected: Likelihood
    relative: float
    """Largest |Δ| of a token's log-probability divided by the standard deviation of the
    reference's logits for the query."""
    block: int | None
    """First block after which the hidden states differ by more than the tolerance."""


@dataclass(slots=True)
class _Followed:
    """One batch on its way through both models."""

    batch: Batch
    found_BTD: np.ndarray
    expected_BTD: np.ndarray
    first: dict[int, int] = field(default_factory=dict[int, int])
    """By row, the first block after which the two sides differ by more than the tolerance."""

    def compare(self, block: int, tolerance: float) -> None:
        """Note the rows that differ first after this block."""
        with np.errstate(invalid="ignore"):
            delta_B = np.abs(self.found_BTD - self.expected_BTD).max((1, 2))
            spread_B = self.expected_BTD.std((1, 2), dtype=np.float64)
        for row, (delta, spread) in enumerate(zip(delta_B, spread_B, strict=True)):
            if not over_spread(float(delta), float(spread)) <= tolerance:
                self.first.setdefault(row, block)


def compare_tasks(
    checkpoint: Checkpoint, source: Checkpoint, verdict: Verdict, *, asked: TaskRequests | None
) -> Work[None]:
    """Judge the level, and add it to the verdict.

    Args:
        checkpoint, source: both sides, of one size.
        verdict: verdict that the level is added to.
        asked: requests to answer; None stands for those that are built in.

    Raises:
        GptjError: the reference's log-likelihoods are NaN or infinite, so nothing can be judged; or
            the figures of the tasks cannot be computed from the likelihoods.
    """
    from golden.reference import StreamedReference
    from gptj_model.streaming.forward import StreamedModel

    config = source.config
    asked = asked or built_in(config)
    queries = list(dict.fromkeys(q for request in asked.requests for q in request.queries))
    groups = _groups(queries, config)
    verdict.plan_memory(_memory(config, groups))
    ours = StreamedModel(checkpoint.config, checkpoint.source, checkpoint.scheme)
    reference = StreamedReference(
        config, source.source, source.scheme, round_to=common_dtype(checkpoint)
    )
    run = _Run(ours, reference, verdict.tolerance)
    stages = len(groups) * (config.n_layer + 1)
    done, compared = 0, dict[int, _Compared]()
    for number, group in enumerate(groups, start=1):
        for event in run.group(group, compared, last=number == len(groups)):
            name = f"group {number} of {len(groups)}, {event}" if len(groups) > 1 else event
            yield Progress(done := done + 1, stages, name)
    _judge(asked, {query: compared[n] for n, query in enumerate(queries)}, verdict)


def _groups(queries: Sequence[Query], config: GPTJConfig) -> list[list[Batch]]:
    """Return batches of about as many tokens as the model's length, in groups whose hidden states
    fit in memory."""
    longest = max(len(query.ids) for query in queries)
    size = max(1, min(_TEXTS, config.n_positions // longest))
    return list(grouped(batches(queries, size), lambda batch: _states(batch, config), _STATES))


def _states(batch: Batch, config: GPTJConfig) -> int:
    """Return the bytes of a batch's hidden states on both sides."""
    return 2 * 4 * batch.ids_BT.size * config.n_embd


def _memory(config: GPTJConfig, groups: Sequence[Sequence[Batch]]) -> int:
    texts, length = groups[0][0].ids_BT.shape  # the longest come first
    return tasks_memory(
        config,
        batch=texts,
        length=length,
        states=max(sum(_states(batch, config) for batch in group) for group in groups),
        scored=max(len(batch.labels_N) for group in groups for batch in group),
    )


class _Run:
    """Groups of batches on their way through both models.

    Args:
        ours, reference: both models, with no block loaded.
        tolerance: largest |Δ| of hidden states divided by their standard deviation.
    """

    def __init__(self, ours: StreamedModel, reference: StreamedReference, tolerance: float) -> None:
        self._ours = ours
        self._reference = reference
        self._tolerance = tolerance

    def group(
        self, group: Sequence[Batch], compared: dict[int, _Compared], *, last: bool
    ) -> Iterator[str]:
        """Add each query of a group to `compared`, by its index, and yield the stages that are
        done.

        Args:
            group: batches that share one pass.
            compared: outcomes so far.
            last: whether no group follows.
        """
        ours, reference = self._ours, self._reference
        followed = [_Followed(b, ours.embed(b.ids_BT), reference.embed(b.ids_BT)) for b in group]
        for i in range(reference.config.n_layer):
            our_block, their_block = ours.load_block(i), reference.load_block(i)
            for f in followed:
                B, T = f.batch.ids_BT.shape
                positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
                f.found_BTD = our_block.run(f.found_BTD, positions_BT)
                f.expected_BTD = their_block.run(f.expected_BTD, positions_BT)
                f.compare(i, self._tolerance)
            yield f"block {i}"
        our_head, their_head = ours.head(last=last), reference.head(last=last)
        labels = [f.batch.labels_N for f in followed]
        found = our_head.likelihoods(
            our_head.normed([f.batch.picked(f.found_BTD) for f in followed]), labels
        )
        expected = their_head.likelihoods(
            their_head.normed([f.batch.picked(f.expected_BTD) for f in followed]), labels
        )
        for f, (logprobs_N, greedy_N), theirs in zip(followed, found, expected, strict=True):
            compared |= _compared(f, logprobs_N, greedy_N, theirs)
        yield "head"


def _compared(
    f: _Followed, logprobs_N: np.ndarray, greedy_N: np.ndarray, theirs: TokenLikelihoods
) -> dict[int, _Compared]:
    """Return the queries of a batch on both sides, by their index."""
    found = f.batch.answers(logprobs_N, greedy_N)
    expected = f.batch.answers(theirs.logprobs_N, theirs.greedy_N)
    outcomes: dict[int, _Compared] = {}
    for (query, own), row in zip(f.batch.by_query(), f.batch.rows, strict=True):
        variance = theirs.square_N[own].mean() - theirs.mean_N[own].mean() ** 2
        with np.errstate(invalid="ignore"):
            delta = np.abs(logprobs_N[own] - theirs.logprobs_N[own]).max()
        outcomes[query] = _Compared(
            found=found[query],
            expected=expected[query],
            relative=over_spread(float(delta), max(0.0, float(variance)) ** 0.5),
            block=f.first.get(row),
        )
    return outcomes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """One request on both sides."""

    request: TaskRequest
    found: Likelihood
    expected: Likelihood
    relative: float
    """Largest figure of its queries."""
    block: int | None
    """First block of any of its queries after which the two sides differ."""

    @property
    def delta(self) -> float:
        """Difference of the log-likelihoods."""
        return self.found.logprob - self.expected.logprob

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.request.task,
            "document": self.request.document,
            "choice": self.request.choice,
            "shown": self.request.shown,
            "tokens": sum(query.scored for query in self.request.queries),
            "found": json_number(self.found.logprob),
            "expected": json_number(self.expected.logprob),
            "difference": json_number(self.delta),
            "relative": json_number(self.relative),
            "found_greedy": self.found.greedy,
            "expected_greedy": self.expected.greedy,
        }


def _row(request: TaskRequest, compared: Mapping[Query, _Compared]) -> _Row:
    own = [compared[query] for query in request.queries]
    return _Row(
        request=request,
        found=request.likelihood({q: compared[q].found for q in request.queries}),
        expected=request.likelihood({q: compared[q].expected for q in request.queries}),
        relative=_largest([c.relative for c in own]),
        block=min((c.block for c in own if c.block is not None), default=None),
    )


def _largest(values: Sequence[float]) -> float:
    """Return the largest value; NaN if one is NaN."""
    return float(np.max(values))


def _judge(asked: TaskRequests, compared: Mapping[Query, _Compared], verdict: Verdict) -> None:
    tolerance = LIKELIHOODS_OVER_LOGITS * verdict.tolerance
    rows = [_row(request, compared) for request in asked.requests]
    _refuse_unjudged(rows)
    verdict.note(*(_difference(r, tolerance) for r in rows if not r.relative <= tolerance))
    sides = (
        {q: c.found for q, c in compared.items()},
        {q: c.expected for q, c in compared.items()},
    )
    tasks = list(dict.fromkeys(row.request.task for row in rows))
    verdict.levels[TASKS_LEVEL] = LevelResult(
        ok=all(row.relative <= tolerance for row in rows),
        figures={
            "compared": len(rows),
            "max_abs": json_number(_largest([abs(row.delta) for row in rows])),
            "relative": json_number(_largest([row.relative for row in rows])),
            "tolerance": tolerance,
            "greedy_changed": _greedy_changed(rows),
            "answers_changed": _answers_changed(rows),
            "source": asked.source,
            "tasks": [_task(name, [r for r in rows if r.request.task == name]) for name in tasks],
            "metrics": _both(*(asked.metrics(side) for side in sides)),
            "requests": [row.to_json() for row in rows],
        },
    )


def _refuse_unjudged(rows: Sequence[_Row]) -> None:
    """Raise a GptjError if a log-likelihood of the reference is not a number."""
    for row in rows:
        if not np.isfinite(row.expected.logprob):
            raise GptjError(
                f"{_name(row.request)}: the original's log-likelihood is NaN or infinite, so "
                "nothing can be judged",
                hint="compare bits with `--level weights`; its weights hold NaN or infinite values",
            )


def _difference(row: _Row, tolerance: float) -> Difference:
    return Difference(
        TASKS_LEVEL,
        f"log-likelihood {row.found.logprob:.6g}; max |Δ| of a token's is {row.relative:.3g} "
        "of the logits' standard deviation",
        f"log-likelihood {row.expected.logprob:.6g}; max |Δ| of at most {tolerance:g}",
        block=row.block,
        prompt=_name(row.request),
    )


def _name(request: TaskRequest) -> str:
    return f"{request.task}, document {request.document}, choice {request.choice}"


def _greedy_changed(rows: Sequence[_Row]) -> int:
    return sum(row.found.greedy != row.expected.greedy for row in rows)


def _answers_changed(rows: Sequence[_Row]) -> int:
    """Return the number of documents whose answer differs."""
    by_name = {(r.request.task, r.request.document, r.request.choice): r for r in rows}
    changed = 0
    for own in by_document(row.request for row in rows).values():
        of_document = [by_name[r.task, r.document, r.choice] for r in own]
        changed += chosen([r.found for r in of_document]) != chosen(
            [r.expected for r in of_document]
        )
    return changed


def _task(name: str, rows: Sequence[_Row]) -> dict[str, Any]:
    return {
        "name": name,
        "requests": len(rows),
        "documents": len(by_document(row.request for row in rows)),
        "max_abs": json_number(_largest([abs(row.delta) for row in rows])),
        "relative": json_number(_largest([row.relative for row in rows])),
        "greedy_changed": _greedy_changed(rows),
        "answers_changed": _answers_changed(rows),
    }


def _both(found: Metrics, expected: Metrics) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the figures of both sides, by task and name."""
    return {
        task: {
            name: {"found": json_number(found[task][name]), "expected": json_number(value)}
            for name, value in figures.items()
        }
        for task, figures in expected.items()
    }
