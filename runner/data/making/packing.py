"""Cut a stream of tokens into examples; pure, and numpy only.

The stream is cut into sequences of max_sequence_length + 1 tokens that do not overlap. The inputs
are all tokens of a sequence but the last, the labels all but the first. A shorter sequence is
padded with end-of-text, and the padding is masked.
"""

from __future__ import annotations

import random

import numpy as np


class Packer:
    """Packs tokens into blocks of examples, int32 of shape (examples, 3, length).

    Args:
        length: number of tokens per example, max_sequence_length.
        end: id of the end-of-text token, which is also the padding.
        short_seq_prob: share of the sequences that are shortened by a random number of tokens.
        seed: seed of the choice and of the new length of shortened sequences.
        made: number of examples that an earlier run made from the same stream.
        keep_all: put every token into an example: the tokens that a shortened sequence leaves
            over begin the next one, and the last sequence is padded. The reference drops both.
    """

    def __init__(
        self,
        length: int,
        end: int,
        *,
        short_seq_prob: float = 0.0,
        seed: int = 0,
        made: int = 0,
        keep_all: bool = True,
    ) -> None:
        self._length = length
        self._end = end
        self._short = short_seq_prob
        self._seed = seed
        self._made = made
        self._keep_all = keep_all
        self._pending = np.empty(0, np.int32)

    @property
    def left(self) -> int:
        """Number of tokens that are not in an example yet."""
        return len(self._pending)

    def add(self, tokens: np.ndarray) -> None:
        """Append tokens to the stream."""
        self._pending = np.concatenate((self._pending, tokens))

    def cut(self, most: int) -> np.ndarray:
        """Return as many examples as the tokens suffice for, at most `most`."""
        if self._short:
            return self._cut_one(most)
        size = self._length + 1
        count = min(most, len(self._pending) // size)
        sequences = self._pending[: count * size].reshape(count, size)
        self._pending = self._pending[count * size :]
        return _block(sequences, np.full(count, size))

    def finish(self) -> np.ndarray:
        """Return a padded example of the tokens that are left, or an empty block."""
        rest, self._pending = self._pending, self._pending[:0]
        return self._padded(rest) if self._keep_all and len(rest) else self._nothing()

    def _cut_one(self, most: int) -> np.ndarray:
        size = self._next_size()
        used = size if self._keep_all else self._length + 1
        if not most or len(self._pending) < used:
            return self._nothing()
        tokens, self._pending = self._pending[:size], self._pending[used:]
        self._made += 1
        return self._padded(tokens)

    def _next_size(self) -> int:
        # Depends on the number of the example alone, so that a run can resume anywhere.
        draw = random.Random(f"{self._seed} {self._made}")
        if self._length < 2 or draw.random() >= self._short:
            return self._length + 1
        return draw.randint(2, self._length)

    def _padded(self, tokens: np.ndarray) -> np.ndarray:
        sequence = np.full((1, self._length + 1), self._end)
        sequence[0, : len(tokens)] = tokens
        return _block(sequence, np.array([len(tokens)]))

    def _nothing(self) -> np.ndarray:
        return np.empty((0, 3, self._length), np.int32)


def _block(sequences: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return examples of sequences of length + 1 tokens, of which the first `real` are text."""
    count, size = sequences.shape
    block = np.empty((count, 3, size - 1), np.int32)
    block[:, 0] = sequences[:, :-1]
    # A label counts when it is a token of the text, not padding.
    block[:, 1] = np.arange(1, size) < real[:, None]
    block[:, 2] = sequences[:, 1:]
    return block
