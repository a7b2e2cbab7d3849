"""Token cross-entropy as the reference defines it.

Shape suffixes: B batch, T time, V vocabulary.
"""

# keras.ops is annotated as if its functions returned None.
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false
# pyright: reportOptionalMemberAccess=false, reportOptionalIterable=false

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops


class TokenLoss(NamedTuple):
    """Sums over the tokens that count; float32 scalars."""

    total: Any
    """Sum of their cross-entropies, in nats."""
    count: Any
    """Their number."""
    correct: Any
    """Number of them whose most likely token is the label."""

    @property
    def mean(self) -> Any:
        """Mean cross-entropy; 0 when no token counts."""
        return self.total / ops.maximum(self.count, 1.0)


def token_loss(logits_BTV, labels_BT, ignored_BT) -> TokenLoss:
    """Cross-entropy of the labels.

    Args:
        logits_BTV: any float dtype; computed in float32.
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
