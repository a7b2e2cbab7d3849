"""Tensors with one row per token, read a part of the vocabulary at a time.

Shape suffixes: D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gptj_model.config import GPTJConfig
from gptj_model.op import Op
from gptj_model.source import TensorSource, read_columns, read_rows
from gptj_model.tensors import EMBEDDING, HEAD_BIAS, HEAD_WEIGHT, Scheme, Tensor, embedding, table

#: Tokens per part; with the 6B's width 134 MB in float32.
PART = 8192


def parts(config: GPTJConfig) -> Iterator[tuple[int, int]]:
    """Yield the first token of each part of the vocabulary, and the one after its last."""
    for start in range(0, config.vocab_size, PART):
        yield start, min(start + PART, config.vocab_size)


def read_tokens(
    source: TensorSource, tensor: Tensor, scheme: Scheme, start: int, stop: int
) -> np.ndarray:
    """Return rows start:stop of a tensor in HF's layout, one per token: (stop - start, …)."""
    name = tensor.name(scheme)
    if tensor.op(scheme, Scheme.HF) is Op.COPY:
        return read_rows(source, name, start, stop)
    return read_columns(source, name, start, stop).T


def gather_rows(read: Callable[[int], np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Return one row per token id, each distinct row read once.

    Args:
        read: returns the row of a token id, shape (D,).
        ids: integer ids of any shape.

    Returns:
        The rows, shape (*ids.shape, D), in the dtype of `read`.
    """
    unique, where = np.unique(ids, return_inverse=True)
    return np.stack([read(int(i)) for i in unique])[where.reshape(ids.shape)]


def read_embeddings(
    config: GPTJConfig, source: TensorSource, scheme: Scheme, ids: np.ndarray
) -> np.ndarray:
    """Return the embeddings of token ids in the dtype they are stored in; see `gather_rows`."""
    name = embedding(config).name(scheme)
    return gather_rows(lambda i: read_rows(source, name, i, i + 1)[0], ids)


def read_head(
    config: GPTJConfig, source: TensorSource, scheme: Scheme, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return weight (stop - start, D) and bias (stop - start) of the head for some tokens."""
    by_name = {t.hf: t for t in table(config)}
    weight = by_name[EMBEDDING.hf if config.tie_word_embeddings else HEAD_WEIGHT.hf]
    bias = by_name[HEAD_BIAS.hf]
    weight_VD = read_tokens(source, weight, scheme, start, stop)
    return weight_VD, read_tokens(source, bias, scheme, start, stop)
