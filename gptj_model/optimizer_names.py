"""Names of Adam's two moments for every row of the table.

A moment has its weight's shape and moves by its weight's op. TensorFlow checkpoints name it after
the weight; PyTorch and the CS client number the parameters, each in its own order.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from itertools import chain

from gptj_model.config import GPTJConfig
from gptj_model.tensors import (
    FINAL_NORM,
    KEY,
    QUERY,
    SLOTS,
    VALUE,
    Scheme,
    Tensor,
    slot_name,
    table,
)

#: First and second moment, as PyTorch and the CS client call them.
MOMENTS = ("exp_avg", "exp_avg_sq")

#: Prefix of numbered state, before the number of the parameter.
STATE = "optimizer.state."

#: Optimizers of the reference that keep these two moments; a new checkpoint gets the first.
ADAMS = ("adamw", "adam")

#: Projections whose places GPTJForCausalLM.parameters() exchanges, against the table's order.
_HF_INSTEAD = {QUERY.layer: KEY.layer, KEY.layer: VALUE.layer, VALUE.layer: QUERY.layer}


class Grouping(Enum):
    """How an optimizer was given the parameters, which determines their numbers."""

    ONE = "one"
    """One group, as torch.optim.AdamW(model.parameters()) has."""
    DECAY = "decay"
    """Two groups, first the matrices, which have weight decay: transformers' Trainer and the CS
    client."""


#: Groupings that the numbers of each scheme's optimizers may follow, the usual one first.
GROUPINGS: dict[Scheme, tuple[Grouping, ...]] = {
    Scheme.HF: (Grouping.ONE, Grouping.DECAY),
    Scheme.CS: (Grouping.DECAY,),
}


def parameter_groups(
    config: GPTJConfig, scheme: Scheme, grouping: Grouping
) -> list[tuple[Tensor, ...]]:
    """Return the rows in the order of their numbers, by parameter group."""
    rows = table(config)
    if scheme is Scheme.HF:
        rows = _in_hf_order(rows)
    if grouping is Grouping.ONE:
        return [tuple(rows)]
    matrices = tuple(t for t in rows if len(t.shape) > 1)
    others = [t for t in rows if len(t.shape) == 1]
    if scheme is Scheme.CS:
        final = {spec.hf for spec in FINAL_NORM}
        others.sort(key=lambda t: t.hf not in final)
    return [matrices, tuple(others)]


def numbered_moments(
    config: GPTJConfig, scheme: Scheme, grouping: Grouping
) -> dict[str, tuple[str, str]]:
    """Return the names of both moments by the HF name of their row, where parameters are
    numbered."""
    rows = chain(*parameter_groups(config, scheme, grouping))
    first, second = MOMENTS
    return {t.hf: (f"{STATE}{n}.{first}", f"{STATE}{n}.{second}") for n, t in enumerate(rows)}


def named_moments(config: GPTJConfig, optimizer_type: str) -> Mapping[str, tuple[str, str]]:
    """Return the names of both moments by the HF name of their row in TensorFlow checkpoints, for
    one of `ADAMS`."""
    first, second = SLOTS[optimizer_type]
    return {t.hf: (slot_name(t.tf, first), slot_name(t.tf, second)) for t in table(config)}


def _in_hf_order(rows: list[Tensor]) -> list[Tensor]:
    by_place = {(t.block, t.layer, t.role): t for t in rows}
    return [by_place[t.block, _HF_INSTEAD.get(t.layer, t.layer), t.role] for t in rows]
