"""Put whole examples into sequences; pure, and numpy only.

A unit is a token with flags, int32 of shape (units, 2): its id, and `COUNTED` if the loss counts
it, plus `LAST` if it ends an example. Examples are never divided: a sequence takes them in order
as long as the next one fits.
"""

from __future__ import annotations

import numpy as np

COUNTED, LAST = 1, 2


def units(ids: list[int], counted: np.ndarray) -> np.ndarray:
    """Return the units of one example."""
    found = np.empty((len(ids), 2), np.int32)
    found[:, 0] = ids
    found[:, 1] = counted * COUNTED
    found[-1, 1] |= LAST
    return found


def sequence(tokens: np.ndarray, length: int, end: int) -> np.ndarray:
    """Return ids, mask and labels of one sequence, int32 of shape (3, length).

    Args:
        tokens: at most length + 1 units.
        length: number of tokens per sequence, max_sequence_length.
        end: id of the end-of-text token, which is also the padding.
    """
    block = np.full((3, length), end, np.int32)
    count = len(tokens)
    block[0, :count] = tokens[:length, 0]
    block[2, : count - 1] = tokens[1:, 0]
    block[1] = 0
    block[1, : count - 1] = tokens[1:, 1] & COUNTED
    return block


class ExamplePacker:
    """Packs examples into sequences; see `runner.data.making.build.Assembler`.

    Args:
        length: number of tokens per sequence, max_sequence_length.
        end: id of the end-of-text token, which is also the padding.
    """

    def __init__(self, length: int, end: int) -> None:
        self._length = length
        self._end = end
        self._pending = np.empty((0, 2), np.int32)

    @property
    def left(self) -> int:
        """Number of units that are not in a sequence yet."""
        return len(self._pending)

    def add(self, units: np.ndarray) -> None:
        """Append the units of whole examples."""
        self._pending = np.concatenate((self._pending, units))

    def cut(self, most: int) -> np.ndarray:
        """Return at most `most` sequences to which no further example can be added."""
        ends = np.flatnonzero(self._pending[:, 1] & LAST) + 1
        rows: list[np.ndarray] = []
        start = 0
        while len(rows) < most and start < len(self._pending):
            room = start + self._length + 1
            end = int(ends[np.searchsorted(ends, room, side="right") - 1])
            if end == len(self._pending) and end < room:
                break  # the next example may still fit
            rows.append(sequence(self._pending[start:end], self._length, self._end))
            start = end
        self._pending = self._pending[start:]
        return np.stack(rows) if rows else self._nothing()

    def finish(self) -> np.ndarray:
        """Return the last sequence, or an empty block."""
        rest, self._pending = self._pending, self._pending[:0]
        if not len(rest):
            return self._nothing()
        return sequence(rest, self._length, self._end)[None]

    def _nothing(self) -> np.ndarray:
        return np.empty((0, 3, self._length), np.int32)
