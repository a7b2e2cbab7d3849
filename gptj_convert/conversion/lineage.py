"""The model on the hub that a checkpoint is or was made from, and what became of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gptj_convert.hub.address import is_repository

#: Relations to a base model that the hub knows and that occur here. A checkpoint with the same
#: values in another format has none of them.
ADAPTER, FINETUNE, QUANTIZED = RELATIONS = ("adapter", "finetune", "quantized")

_SINGLE = ("repository", "commit", "relation", "step")
_LISTS = ("records", "data_sets")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Origin of a checkpoint's weights, as far as it is recorded."""

    repository: str | None = None
    """Repository of the base model, as OWNER/NAME."""
    commit: str | None = None
    """Commit of that repository."""
    relation: str | None = None
    """One of `RELATIONS`; None means the same values."""
    step: int | None = None
    """Step of the training run that the weights are from."""
    records: tuple[str, ...] = ()
    """Names of the folders of records that the run read."""
    data_sets: tuple[str, ...] = ()
    """Repositories of data sets that these records were made from, as OWNER/NAME."""

    def to_values(self) -> dict[str, Any]:
        """Return the fields that are known, as JSON values."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value is not None and value != ()
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Lineage:
        """Return the lineage that `to_values` describes.

        Raises:
            ValueError: the values are none of a lineage.
        """
        repository, commit, relation, step = map(values.get, _SINGLE)
        records, data_sets = (values.get(name, []) for name in _LISTS)
        valid = (
            values.keys() <= {*_SINGLE, *_LISTS}
            and isinstance(records, list)
            and isinstance(data_sets, list)
            and all(isinstance(name, str) for name in (*records, *data_sets))
            and all(map(is_repository, data_sets))
            and (repository is None or (isinstance(repository, str) and is_repository(repository)))
            and (commit is None or (isinstance(commit, str) and bool(_COMMIT.fullmatch(commit))))
            and relation in (None, *RELATIONS)
            and (step is None or type(step) is int)
        )
        if not valid:
            raise ValueError(f"origin {dict(values)!r} is not that of a checkpoint")
        return cls(
            repository=repository,
            commit=commit,
            relation=relation,
            step=step,
            records=tuple(records),
            data_sets=tuple(data_sets),
        )

    def altered(self, *, trained: bool, rounded: bool) -> Lineage:
        """Return the lineage of the result of a conversion.

        Args:
            trained: whether an adapter was merged.
            rounded: whether values were rounded to a narrower dtype.
        """
        if trained:
            return replace(self, relation=FINETUNE)
        return replace(self, relation=QUANTIZED) if rounded and not self.relation else self
