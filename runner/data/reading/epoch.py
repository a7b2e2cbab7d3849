"""The size of an epoch: records, tokens and steps, for people and for `--epochs`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from runner.config.params import InputParams
from runner.data.reading.data_params import stated_files
from runner.data.reading.place import Place, whole_batches
from runner.data.reading.records import (
    MAX_RECORD_BYTES,
    check_records,
    count_records,
    find_records,
    is_compressed,
    read_records,
)

#: Size in bytes of records without a data_params.json up to which they are counted rather than
#: estimated: one or two seconds of reading.
_COUNTED = 10**9


@dataclass(frozen=True, slots=True)
class Epoch:
    """One pass over the records of a section."""

    records: int
    exact: bool
    """Whether the records were counted; otherwise their number is estimated."""
    batches: int
    """Number of whole batches, those that an epoch reads."""
    length: int
    """Tokens per record."""
    group: int
    """Batches per step."""

    @property
    def steps(self) -> Fraction:
        """Steps per epoch; not whole where a step's batches span two epochs."""
        return Fraction(self.batches, self.group)

    def steps_to(self, epochs: float, place: Place, batch_size: int) -> int:
        """Return the number of steps from a place until `epochs` epochs are read, rounded up."""
        read = place.epoch * self.batches + min(-(-place.record // batch_size), self.batches)
        left = math.ceil(Fraction(epochs) * self.batches) - read
        return max(0, -(-left // self.group))

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        digits = 0 if self.steps.denominator == 1 else 1
        return (
            f"{about}{self.records:,} records, {self.records * self.length:,} tokens, "
            f"{float(self.steps):,.{digits}f} steps an epoch"
        )


def check_section(
    params: InputParams, *, vocab_size: int, group: int = 1, exact: bool = False
) -> Epoch:
    """Check the records of a section against the model, and return the size of an epoch.

    The first record of each file is read, which shows records of another length or vocabulary.

    Args:
        params: section train_input or eval_input.
        vocab_size: size of the model's vocabulary.
        group: batches per step.
        exact: whether to count the records however many there are.

    Raises:
        UsageError: there are no records.
        DataFault: the files differ from data_params.json, hold fewer records than a batch, or
            the first record of a file is invalid.
    """
    paths = find_records(params.data_dir)
    length = params.max_sequence_length
    check_records(paths, length=length, vocab_size=vocab_size, only_first=True)
    stated = all((stated_files(p.parent) or {}).get(p.name) for p in paths)
    exact = exact or stated or sum(p.stat().st_size for p in paths) <= _COUNTED
    records = count_records(paths) if exact else _estimated(paths)
    whole_batches(params, records if exact else count_records(paths, enough=params.batch_size))
    return Epoch(records, exact, max(1, records // params.batch_size), length, group)


def _estimated(paths: Sequence[Path]) -> int:
    """Return about how many records the files hold, by the size of the first of each."""
    count = 0
    for path in paths:
        packed = 3 if is_compressed(path) else 1  # about what gzip saves on token ids
        first = next(read_records(path, max_bytes=MAX_RECORD_BYTES), None)
        count += packed * path.stat().st_size // (len(first[2]) + 16) if first else 0
    return count
