"""Metrics of an evaluation, shared by YAML, evaluation and reports."""

from __future__ import annotations

from enum import StrEnum

#: Prefix of evaluation metrics in metrics.jsonl.
EVAL_PREFIX = "eval/"


class EvalMetric(StrEnum):
    """Metrics of an evaluation on records, under the reference's names."""

    LOSS = "loss"
    ACCURACY = "eval/accuracy"
    PERPLEXITY = "eval/lm_perplexity"
    BITS_PER_BYTE = "eval/bits_per_byte"

    @property
    def falls(self) -> bool:
        """Whether a smaller value is better."""
        return self is not EvalMetric.ACCURACY

    @property
    def row_key(self) -> str:
        """Key in the evaluation rows of metrics.jsonl, where `loss` alone is the training's."""
        return EVAL_PREFIX + self.removeprefix(EVAL_PREFIX)

    @classmethod
    def _missing_(cls, value: object) -> EvalMetric | None:
        """Accept a metric with or without the prefix."""
        name = str(value).removeprefix(EVAL_PREFIX)
        return next((m for m in cls if m.removeprefix(EVAL_PREFIX) == name), None)
