"""Token cross-entropy as the reference defines it.

Shape suffixes: B batch, T time, N tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from keras import ops, tree

from gptj_model.network.array_type import Tensor

#: Largest number of logits held at once: 64 MiB of float32.
_CHUNK_LOGITS = 2**24


class TokenLoss(NamedTuple):
    """Sums over the tokens that count; float32 scalars."""

    total: Tensor
    """Sum of their cross-entropies, in nats."""
    count: Tensor
    """Number of these tokens."""
    correct: Tensor
    """Number of these tokens whose most likely token is the label."""

    @property
    def mean(self) -> Tensor:
        """Mean cross-entropy; 0 when no token counts."""
        return self.total / ops.maximum(self.count, 1.0)


def token_loss(logits_BTV: Tensor, labels_BT: Tensor, ignored_BT: Tensor) -> TokenLoss:
    """Return the cross-entropy of the labels.

    Args:
        logits_BTV: logits of any float dtype; the loss is computed in float32.
        labels_BT: int32 token ids.
        ignored_BT: 1 on padding and other tokens that do not count, 0 elsewhere.
    """
    logits_BTV = ops.cast(logits_BTV, "float32")
    counted_BT = 1.0 - ops.cast(ignored_BT, "float32")
    losses_BT = ops.sparse_categorical_crossentropy(labels_BT, logits_BTV, from_logits=True)
    hits_BT = ops.cast(ops.argmax(logits_BTV, axis=-1), "int32") == labels_BT
    return TokenLoss(
        total=ops.sum(losses_BT * counted_BT),
        count=ops.sum(counted_BT),
        correct=ops.sum(ops.cast(hits_BT, "float32") * counted_BT),
    )


def head_loss(
    h_BTD: Tensor,
    kernel_DV: Tensor,
    bias_V: Tensor,
    labels_BT: Tensor,
    ignored_BT: Tensor,
    training: bool = False,
    *,
    devices: int = 1,
) -> TokenLoss:
    """Return the loss of the head's logits, computed a chunk of tokens at a time.

    In training the gradients are computed together with the loss, so that the logits of a chunk are
    never needed again: this takes the memory of one chunk, and no more multiplications than without
    chunks.

    Args:
        h_BTD: normed hidden states; matrices are multiplied in their dtype.
        kernel_DV: kernel of the head, float32.
        bias_V: bias of the head, float32.
        labels_BT: int32 token ids.
        ignored_BT: 1 on tokens that do not count, 0 elsewhere.
        training: whether gradients will be asked for.
        devices: number of devices that share sequences and vocabulary. Each chunk then has tokens
            of every sequence, so that all devices work on it, and is larger by that number.
    """
    D, V = kernel_DV.shape
    B, T = labels_BT.shape
    chunks = _chunks(T, B * V // devices) if devices > 1 else _chunks(B * T, V)
    counted_BT = 1.0 - ops.cast(ignored_BT, "float32")

    def cut(x: Tensor, *rest: int) -> Tensor:
        if devices > 1:
            x = ops.reshape(x, (B, chunks, -1, *rest))
            x = ops.transpose(x, (1, 0, 2, *range(3, 3 + len(rest))))
        return ops.reshape(x, (chunks, -1, *rest))

    h_nCD, labels_nC, counted_nC = cut(h_BTD, D), cut(labels_BT), cut(counted_BT)

    @ops.custom_gradient
    def sums(h_nCD: Tensor, kernel_DV: Tensor, bias_V: Tensor) -> Tensor:
        kernel_DV = ops.cast(kernel_DV, h_nCD.dtype)
        zero = ops.zeros((), "float32")
        begin = [zero, zero]
        if training:
            begin += [ops.zeros((D, V), "float32"), ops.zeros((V,), "float32")]
            begin += [ops.zeros(h_nCD.shape, "float32")]

        def add_chunk(n: Tensor, carry: list[Tensor]) -> list[Tensor]:
            labels_C, counted_C = labels_nC[n], counted_nC[n]
            new = _chunk_loss(h_nCD[n], labels_C, counted_C, kernel_DV, bias_V, training)
            summed = [a + b for a, b in zip(carry[:4], new[:4], strict=True)]
            placed = [ops.slice_update(d, (n, 0, 0), new[4][None]) for d in carry[4:]]
            return [*summed, *placed]

        carry = add_chunk(0, begin) if chunks == 1 else ops.fori_loop(0, chunks, add_chunk, begin)

        def gradient(*args: Tensor, upstream: Tensor = None) -> tuple[Tensor, ...]:
            # TensorFlow passes one argument per output, JAX one for all outputs.
            up = tree.flatten(args if upstream is None else upstream)[0]
            d_h = ops.cast(carry[4] * up, h_nCD.dtype)
            return d_h, carry[2] * up, carry[3] * up

        return (carry[0], carry[1]), gradient

    total, correct = sums(h_nCD, ops.convert_to_tensor(kernel_DV), ops.convert_to_tensor(bias_V))
    return TokenLoss(total=total, count=ops.sum(counted_BT), correct=correct)


def _chunk_loss(
    h_CD: Tensor,
    labels_C: Tensor,
    counted_C: Tensor,
    kernel_DV: Tensor,
    bias_V: Tensor,
    training: bool,
) -> tuple[Tensor, ...]:
    """Return the sums of losses and of hits; in training also the contributions to the gradients of
    kernel and bias, and the gradient of h in float32."""
    logits_CV = head_logits(h_CD, kernel_DV, bias_V)
    top_C1 = ops.max(logits_CV, axis=-1, keepdims=True)
    exp_CV = ops.exp(logits_CV - top_C1)
    sum_C1 = ops.sum(exp_CV, axis=-1, keepdims=True)
    is_label_CV = labels_C[:, None] == ops.arange(bias_V.shape[0], dtype="int32")[None]
    label_C = ops.sum(ops.where(is_label_CV, logits_CV - top_C1, 0.0), axis=-1)
    losses_C = ops.log(sum_C1[:, 0]) - label_C
    hits_C = ops.cast(ops.argmax(logits_CV, axis=-1), "int32") == labels_C
    sums = (ops.sum(losses_C * counted_C), ops.sum(ops.cast(hits_C, "float32") * counted_C))
    if not training:
        return sums
    d_h_CD, d_kernel_DV, d_bias_V = head_gradients(
        h_CD, exp_CV / sum_C1, labels_C, counted_C, kernel_DV
    )
    return *sums, d_kernel_DV, d_bias_V, d_h_CD


def head_logits(h_CD: Tensor, kernel_DV: Tensor, bias_V: Tensor) -> Tensor:
    """Return float32 logits (C, V) of the head, or of a part of the vocabulary.

    Args:
        h_CD: normed hidden states.
        kernel_DV: kernel of the head, in their dtype.
        bias_V: bias of the head, float32.
    """
    return ops.cast(ops.matmul(h_CD, kernel_DV), "float32") + bias_V


def head_gradients(
    h_CD: Tensor,
    probability_CV: Tensor,
    labels_C: Tensor,
    counted_C: Tensor,
    kernel_DV: Tensor,
    *,
    of_head: bool = True,
) -> tuple[Tensor, ...]:
    """Return the gradients of the summed loss, of all of the vocabulary or of a part of it.

    Args:
        h_CD: normed hidden states.
        probability_CV: probability of every token of the (part of the) vocabulary, float32.
        labels_C: int32 index of the label in it; an index beyond it is a label of another part.
        counted_C: 1 on tokens that count, 0 elsewhere.
        kernel_DV: kernel of the (part of the) head, in the dtype of `h_CD`.
        of_head: whether the head is trained.

    Returns:
        Float32 gradients: of `h_CD`, and if `of_head` of the kernel (D, V) and the bias (V,).
    """
    is_label_CV = labels_C[:, None] == ops.arange(probability_CV.shape[1], dtype="int32")[None]
    # The values lie between -1 and 1, so half precision holds them whatever the loss scale and the
    # count.
    d_CV = (probability_CV - ops.cast(is_label_CV, "float32")) * counted_C[:, None]
    narrow_CV = ops.cast(d_CV, h_CD.dtype)
    d_h_CD = ops.cast(ops.matmul(narrow_CV, ops.transpose(kernel_DV)), "float32")
    if not of_head:
        return (d_h_CD,)
    d_kernel_DV = ops.cast(ops.matmul(ops.transpose(h_CD), narrow_CV), "float32")
    return d_h_CD, d_kernel_DV, ops.sum(d_CV, axis=0)


def _chunks(tokens: int, width: int) -> int:
    """Return the smallest number of equal chunks of the tokens whose logits, `width` per token, are
    few enough."""
    least = min(max(1, tokens * width // _CHUNK_LOGITS), tokens)
    return next(n for n in range(least, tokens + 1) if tokens % n == 0)


class RunningLoss:
    """Cross-entropy in float64 of logits that arrive a part of the vocabulary at a time.

    Args:
        labels_N: int32 token ids.
    """

    def __init__(self, labels_N: np.ndarray) -> None:
        self._labels_N = labels_N
        self._top_N = np.full(labels_N.shape, -np.inf)
        self._sum_N = np.zeros(labels_N.shape)
        self._label_N = np.zeros(labels_N.shape)
        self._best_N = np.zeros(labels_N.shape, np.int64)

    def add(self, logits_CV: np.ndarray, first: int, start: int) -> None:
        """Add the logits of some tokens for one part of the vocabulary.

        Args:
            logits_CV: float32 logits.
            first: index of the first of these tokens.
            start: first token id of the part.
        """
        tokens = slice(first, first + len(logits_CV))
        rows_C, best_C = np.arange(len(logits_CV)), logits_CV.argmax(-1)
        part_top_C = logits_CV[rows_C, best_C].astype(np.float64)
        top_C = np.maximum(self._top_N[tokens], part_top_C)
        better = part_top_C > self._top_N[tokens]
        self._best_N[tokens] = np.where(better, start + best_C, self._best_N[tokens])
        shifted_CV = logits_CV - top_C[:, None].astype(np.float32)
        part_sum_C = np.exp(shifted_CV, out=shifted_CV).sum(-1, dtype=np.float64)
        self._sum_N[tokens] *= np.exp(self._top_N[tokens] - top_C)
        self._sum_N[tokens] += part_sum_C
        self._top_N[tokens] = top_C
        place_C = self._labels_N[tokens] - start
        inside_C = (place_C >= 0) & (place_C < logits_CV.shape[1])
        found_C = logits_CV[rows_C, np.where(inside_C, place_C, 0)]
        self._label_N[tokens] = np.where(inside_C, found_C, self._label_N[tokens])

    @property
    def log_sum_N(self) -> np.ndarray:
        """Logarithm of the sum of the exponentials of each token's logits."""
        return np.log(self._sum_N) + self._top_N

    @property
    def logprobs_N(self) -> np.ndarray:
        """Log-probability of each label, float64."""
        return self._label_N - self.log_sum_N

    @property
    def hits_N(self) -> np.ndarray:
        """Whether each label is the most likely token."""
        return self._best_N == self._labels_N

    def sums(self, ignored_N: np.ndarray) -> TokenLoss:
        """Return the sums over the tokens that count, once every part is added."""
        counted_N = 1.0 - ignored_N
        return TokenLoss(
            total=(-self.logprobs_N * counted_N).sum(),
            count=counted_N.sum(),
            correct=(self.hits_N * counted_N).sum(),
        )
