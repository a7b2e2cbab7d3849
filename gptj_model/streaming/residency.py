"""What stays in memory of a model that is read block by block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Parts that are read once; the others are read in every pass."""

    blocks: int = 0
    """How many, beside the one that computes."""
    head: bool = False
    """Whether the head is one; of the embedding only the rows of the tokens are ever read."""

    def keeps(self, i: int, n_layer: int) -> bool:
        """Whether block `i` of `n_layer` is one of them.

        They are spread evenly, the first block not among them unless all are: so the next one that
        is read has the more time to come.
        """
        return i * self.blocks // n_layer < (i + 1) * self.blocks // n_layer


NOTHING_KEPT = Kept()
