"""Which weights an optimizer decays: by patterns in params.yaml, by groups in other formats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from gptj_convert.optimizer.state import AdamSettings
from gptj_model.config import GPTJConfig
from gptj_model.optimizer_names import Grouping, parameter_groups
from gptj_model.tensors import NORM, Scheme, Tensor, table

#: Value of `exclude_from_weight_decay` that decays only matrices.
MATRICES_ONLY = ("LayerNorm", "layer_norm", "bias", "Bias", NORM[0].layer)


def decayed(config: GPTJConfig, exclusions: Iterable[str]) -> set[Tensor]:
    """Return the rows whose TF name contains no pattern of `exclude_from_weight_decay`."""
    patterns = [re.compile(pattern) for pattern in exclusions]
    return {t for t in table(config) if not any(p.search(t.tf) for p in patterns)}


def exclusions_of_groups(decays: Sequence[float | None]) -> tuple[str, ...]:
    """Return the patterns that express what groups of parameters with these decays express.

    Args:
        decays: one number for all parameters, or one for the matrices and one for the others.

    Raises:
        ValueError: the second group has a decay of its own, which no pattern can express.
    """
    first, *others = (decay or 0.0 for decay in decays)
    if all(decay == first for decay in others):
        return ()
    if any(others):
        raise ValueError("two decays")
    return MATRICES_ONLY


def group_decays(
    config: GPTJConfig, scheme: Scheme, grouping: Grouping, settings: AdamSettings
) -> list[float]:
    """Return the decay of each group of parameters.

    A group that the settings decay in part is decayed if it holds matrices; `decay_notes` says what
    this changes.
    """
    rows = decayed(config, settings.exclude_from_weight_decay)
    return [
        settings.weight_decay_rate
        if rows.issuperset(group) or any(t in rows and len(t.shape) > 1 for t in group)
        else 0.0
        for group in parameter_groups(config, scheme, grouping)
    ]


def decay_notes(
    config: GPTJConfig, scheme: Scheme, grouping: Grouping, settings: AdamSettings
) -> list[str]:
    """Return notes on what decays, and on what will decay differently in a checkpoint of the
    scheme."""
    rate = settings.weight_decay_rate
    if not rate:
        return ["no weight decay"]
    before = decayed(config, settings.exclude_from_weight_decay)
    notes = [f"weight decay {rate:g} applies to {describe(config, before)}"]
    if scheme is Scheme.TF:
        return notes
    groups = parameter_groups(config, scheme, grouping)
    decays = group_decays(config, scheme, grouping, settings)
    after = {t for group, decay in zip(groups, decays, strict=True) if decay for t in group}
    if after != before:
        way_out = ""
        if scheme is Scheme.HF and grouping is Grouping.ONE:
            way_out = "; `--param-groups decay` makes two groups"
        notes.append(
            f"the result decays {describe(config, after)} instead: it has "
            f"{'one group' if len(groups) == 1 else 'two groups'} of parameters{way_out}"
        )
    return notes


def describe(config: GPTJConfig, rows: set[Tensor]) -> str:
    """Return a description of a set of rows, naming the same tensor of every block once."""
    everything = table(config)
    matrices = {t for t in everything if len(t.shape) > 1}
    if rows == set(everything):
        return "all weights"
    if rows == matrices:
        return "matrices only"
    whole = "matrices, " if rows > matrices else ""
    left = (t for t in everything if t in rows and not (whole and t in matrices))
    return whole + (", ".join(dict.fromkeys(map(_kind, left))) or "no weight")


def _kind(tensor: Tensor) -> str:
    return re.sub(r"^transformer\.(h\.\d+\.)?", "", tensor.hf)
