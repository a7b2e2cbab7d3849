"""Log-likelihoods of tokens given those before them, by a model in memory or by a streamed one.

Shape suffixes: B batch, T time, N scored tokens, C scored tokens of a chunk, D hidden,
V vocabulary.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalSubscript=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import keras
import numpy as np
from keras import ops

from gptj_model.decoding.decoders import compiled
from gptj_model.network.array_type import Tensor
from gptj_model.network.model import GPTJ
from gptj_model.streaming.forward import StreamedModel, normed_states

#: Largest number of logits held at once: 64 MiB of float32.
_CHUNK_LOGITS = 2**24
#: Lengths are rounded up to a multiple of this for JAX, which compiles every shape by itself.
_LENGTH_STEP = 32


@dataclass(frozen=True, slots=True)
class Query:
    """A text of which the last tokens are scored."""

    ids: tuple[int, ...]
    """Token ids, at least one before those that are scored."""
    scored: int
    """Number of tokens at the end that are scored, at least one."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the scored tokens of a query are."""

    logprob: float
    """Log-probability of the scored tokens together, given those before each of them."""
    greedy: bool
    """Whether every scored token is the most likely one at its place."""


#: The likelihoods of some queries, by their index among all.
Answers = dict[int, Likelihood]


class Scorer(Protocol):
    """A model that scores queries."""

    def __call__(self, queries: Sequence[Query]) -> Iterator[Answers]:
        """Yield the likelihoods of some queries after another, the longest texts first."""
        ...


@dataclass(slots=True)
class _Row:
    """Tokens that the model reads once for all queries that end with one of several tokens."""

    ids: tuple[int, ...]
    queries: list[int] = field(default_factory=list[int])
    """Indices of these queries."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Texts that a model reads at once, and what is scored of them."""

    ids_BT: np.ndarray
    """int32 token ids, padded on the right, where no token sees the padding."""
    queries: Sequence[int]
    """Indices of the queries, among all."""
    counts: Sequence[int]
    """Number of scored tokens of each query."""
    rows: Sequence[int]
    """Row that each query is scored in."""
    places_N: np.ndarray
    """int32 index among the batch's B x T tokens of the one before each scored token, query after
    query."""
    labels_N: np.ndarray
    """int32 id of each scored token."""

    def picked(self, h_BTD: np.ndarray) -> np.ndarray:
        """Return the hidden states that scored tokens are predicted from: (1, N, D)."""
        return h_BTD.reshape(-1, h_BTD.shape[-1])[None, self.places_N]

    def by_query(self) -> Iterator[tuple[int, slice]]:
        """Yield the index of each query, and which of the N scored tokens are its own."""
        at = 0
        for query, count in zip(self.queries, self.counts, strict=True):
            yield query, slice(at, at + count)
            at += count

    def answers(self, logprobs_N: np.ndarray, greedy_N: np.ndarray) -> Answers:
        """Return the likelihoods of the queries from those of their tokens."""
        return {
            query: Likelihood(float(logprobs_N[own].sum()), bool(greedy_N[own].all()))
            for query, own in self.by_query()
        }


def batches(queries: Sequence[Query], batch_size: int) -> Iterator[Batch]:
    """Yield batches that score every query once, the longest texts first."""
    rows = _rows(queries)
    for start in range(0, len(rows), batch_size):
        of_batch = rows[start : start + batch_size]
        ids_BT = _padded(of_batch, batch_size)
        asked = [(n, i) for n, row in enumerate(of_batch) for i in row.queries]
        yield Batch(
            ids_BT=ids_BT,
            queries=[i for _, i in asked],
            counts=[queries[i].scored for _, i in asked],
            rows=[n for n, _ in asked],
            places_N=np.concatenate([n * ids_BT.shape[1] + _places(queries[i]) for n, i in asked]),
            labels_N=np.concatenate([_labels(queries[i]) for _, i in asked]),
        )


def grouped(
    found: Iterable[Batch], size: Callable[[Batch], int], memory: int
) -> Iterator[list[Batch]]:
    """Yield groups of batches that share one pass over the weights.

    Args:
        found: the batches.
        size: returns the bytes that a batch takes during a pass.
        memory: largest number of bytes of a group, unless a batch alone takes more.
    """
    group: list[Batch] = []
    room = memory
    for batch in found:
        taken = size(batch)
        if group and taken > room:
            yield group
            group, room = [], memory
        group.append(batch)
        room -= taken
    if group:
        yield group


class ResidentScorer:
    """Scorer with a model in memory, compiled once.

    Args:
        model: model with its weights loaded.
        batch_size: number of texts per forward pass.
    """

    def __init__(self, model: GPTJ, batch_size: int) -> None:
        self._batch_size = batch_size
        # A power of two, to which `_filled` fills.
        self._chunk = 1 << (max(1, _CHUNK_LOGITS // model.config.vocab_size).bit_length() - 1)

        def hidden(ids_BT: Tensor, places_N: Tensor) -> Tensor:
            h_BTD = model.ln_f(model.decode(model.embed(ids_BT), model.context(ids_BT)))
            h_BTD = ops.cast(h_BTD, model.compute_dtype)
            return ops.take(ops.reshape(h_BTD, (-1, model.config.n_embd)), places_N, axis=0)

        def score(h_CD: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
            logits_CV = ops.cast(model.lm_head(h_CD, model.wte.embeddings), "float32")
            label_C = ops.take_along_axis(logits_CV, labels_C[:, None], axis=-1)[:, 0]
            best_C = ops.cast(ops.argmax(logits_CV, axis=-1), "int32")
            return label_C - ops.logsumexp(logits_CV, axis=-1), best_C == labels_C

        width, dtype = model.config.n_embd, model.compute_dtype
        self._hidden = compiled(model, hidden, ((None, None), "int32"), ((None,), "int32"))
        self._score = compiled(model, score, ((None, width), dtype), ((None,), "int32"))

    def __call__(self, queries: Sequence[Query]) -> Iterator[Answers]:
        """Implement `Scorer`."""
        for batch in batches(queries, self._batch_size):
            yield self._answers(batch)

    def _answers(self, batch: Batch) -> Answers:
        places_N, labels_N = batch.places_N, batch.labels_N
        h_ND = np.asarray(
            self._hidden(*map(ops.convert_to_tensor, (batch.ids_BT, _filled(places_N))))
        )
        logprobs_N, hits_N = np.empty(len(labels_N)), np.empty(len(labels_N), bool)
        for start in range(0, len(labels_N), self._chunk):
            chunk = slice(start, min(start + self._chunk, len(labels_N)))
            labels_C = _filled(labels_N[chunk])
            h_CD = h_ND[start : start + len(labels_C)]
            found = self._score(*map(ops.convert_to_tensor, (h_CD, labels_C)))
            count = chunk.stop - start
            logprobs_N[chunk], hits_N[chunk] = (np.asarray(x)[:count] for x in found)
        return batch.answers(logprobs_N, hits_N)


class StreamedScorer:
    """Scorer with a model that is read block by block, once for many texts.

    Args:
        model: the streamed model.
        batch_size: number of texts per forward pass of a block.
        memory: largest size in bytes of the hidden states that share one pass over the weights.
    """

    def __init__(self, model: StreamedModel, batch_size: int, *, memory: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._memory = memory

    def __call__(self, queries: Sequence[Query]) -> Iterator[Answers]:
        """Implement `Scorer`."""
        for group in grouped(batches(queries, self._batch_size), self._size, self._memory):
            yield self._pass(group)

    def _size(self, batch: Batch) -> int:
        return 4 * batch.ids_BT.size * self._model.config.n_embd

    def _pass(self, group: Sequence[Batch]) -> Answers:
        head, normed = normed_states(self._model, [batch.ids_BT for batch in group])
        picked = [batch.picked(h_BTD) for batch, h_BTD in zip(group, normed, strict=True)]
        found = head.likelihoods(picked, [batch.labels_N for batch in group])
        answers: Answers = {}
        for batch, own in zip(group, found, strict=True):
            answers |= batch.answers(*own)
        return answers


def scorer_of(model: GPTJ | StreamedModel, batch_size: int, *, memory: int) -> Scorer:
    """Return the scorer of a model; `memory` is that of `StreamedScorer`."""
    if isinstance(model, StreamedModel):
        return StreamedScorer(model, batch_size, memory=memory)
    return ResidentScorer(model, batch_size)


def _rows(queries: Sequence[Query]) -> list[_Row]:
    """Return what the model reads, the longest first; queries that differ in their last token alone
    share a row."""
    found: dict[tuple[int, ...], _Row] = {}
    for i, query in enumerate(queries):
        read = query.ids[:-1]
        found.setdefault(read, _Row(read)).queries.append(i)
    return sorted(found.values(), key=lambda row: (-len(row.ids), row.ids))


def _padded(rows: Sequence[_Row], batch_size: int) -> np.ndarray:
    """Return ids (B, T) of one batch, padded on the right, where no token sees the padding."""
    shape = len(rows), len(rows[0].ids)
    if keras.backend.backend() == "jax":
        shape = batch_size, -(-shape[1] // _LENGTH_STEP) * _LENGTH_STEP
    ids_BT = np.zeros(shape, np.int32)
    for own, row in zip(ids_BT, rows, strict=False):
        own[: len(row.ids)] = row.ids
    return ids_BT


def _filled(values_N: np.ndarray) -> np.ndarray:
    """Return the values with zeros after them for JAX, up to a power of two of them."""
    if keras.backend.backend() != "jax":
        return values_N
    return np.pad(values_N, (0, (1 << (len(values_N) - 1).bit_length()) - len(values_N)))


def _places(query: Query) -> np.ndarray:
    """Return where the hidden states lie that the scored tokens are predicted from."""
    last = len(query.ids) - 1
    return np.arange(last - query.scored, last, dtype=np.int32)


def _labels(query: Query) -> np.ndarray:
    return np.array(query.ids[-query.scored :], np.int32)
