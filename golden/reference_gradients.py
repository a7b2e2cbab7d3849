"""Gradients of the reference, back through its stages in reverse, one block at a time.

Shape suffixes: N tokens, B batch, T time, D hidden, V vocabulary, U distinct tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from golden.reference import StreamedReference
from gptj_model.tensors import HEAD_BIAS, HEAD_WEIGHT, final_norm

Gradients = dict[str, np.ndarray]
"""Gradients by HF name, in the dtype of the computation."""


class ReferenceGradients(StreamedReference):
    """Gradients by torch's autograd, with the calls of
    `gptj_model.streaming.backward.StreamedGradients`."""

    def loss_gradients(
        self, logits_NV: np.ndarray, labels_N: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """Return the mean cross-entropy of the labels, and its gradient with respect to the
        logits."""
        labels = torch.from_numpy(labels_N.astype(np.int64))
        logits = _leaf(logits_NV)
        loss = functional.cross_entropy(logits, labels)
        return loss.item(), torch.autograd.grad(loss, logits)[0].numpy()

    def head_gradients(
        self, start: int, stop: int, normed_ND: np.ndarray, d_logits_NV: np.ndarray
    ) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of the normed states and of the head's tokens start:stop."""
        weights = [w.to(_dtype(normed_ND)).requires_grad_() for w in self._read_head(start, stop)]
        d_normed, *d_weights = _backwards(
            lambda x: functional.linear(x, *weights), normed_ND, weights, d_logits_NV
        )
        return d_normed, dict(zip((HEAD_WEIGHT.hf, HEAD_BIAS.hf), d_weights, strict=True))

    def final_norm_gradients(
        self, x_ND: np.ndarray, d_normed_ND: np.ndarray
    ) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of the hidden states and of the final norm's weights."""
        layer = self._loaded_norm().to(_dtype(x_ND))
        names = [t.hf for t in final_norm(self.config)]
        d_x, *d_weights = _backwards(layer, x_ND, list(layer.parameters()), d_normed_ND)
        return d_x, dict(zip(names, d_weights, strict=True))

    def block_gradients(
        self, x_BTD: np.ndarray, positions_BT: np.ndarray, d_out_BTD: np.ndarray
    ) -> tuple[np.ndarray, Gradients]:
        """Return the gradients of the hidden states and of the loaded block's weights."""
        self._block.to(_dtype(x_BTD))
        named = {f"{self._prefix}{name}": p for name, p in self._block.named_parameters()}
        d_x, *d_weights = _backwards(
            lambda x: self._forward(x, positions_BT), x_BTD, list(named.values()), d_out_BTD
        )
        return d_x, dict(zip(named, d_weights, strict=True))

    def embedding_gradients(
        self, ids_N: np.ndarray, d_x_ND: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct tokens (U,), and the gradients of their rows (U, D)."""
        unique_U, where_N = np.unique(ids_N, return_inverse=True)
        where = torch.from_numpy(where_N)
        rows = np.zeros((len(unique_U), d_x_ND.shape[1]), d_x_ND.dtype)
        (gradient,) = _backwards(lambda r: functional.embedding(where, r), rows, [], d_x_ND)
        return unique_U, gradient


def _backwards(
    run: Callable[[torch.Tensor], torch.Tensor],
    x: np.ndarray,
    weights: Sequence[torch.Tensor],
    d_out: np.ndarray,
) -> list[np.ndarray]:
    """Return the gradient of the input, then of each weight."""
    leaf = _leaf(x)
    found = torch.autograd.grad(run(leaf), [leaf, *weights], torch.from_numpy(d_out))
    return [gradient.numpy() for gradient in found]


def _leaf(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).requires_grad_()


def _dtype(values: np.ndarray) -> torch.dtype:
    return torch.from_numpy(values[:0]).dtype
