"""Which parts of a streamed model stay in memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Residency:
    """Parts that are read once; the others are read in every pass."""

    blocks: int = 0
    """Number of blocks that stay, beside the one that computes."""
    head: bool = False
    """Whether the head stays; of the embedding only the rows of the tokens are ever read."""

    def keeps(self, i: int, n_layer: int) -> bool:
        """Return whether block `i` of `n_layer` stays.

        They are spread evenly and leave out the first block unless all stay, so that the next block
        to read has more time to arrive.
        """
        return i * self.blocks // n_layer < (i + 1) * self.blocks // n_layer


NOTHING_RESIDENT = Residency()
