"""The place of a run in its records."""

from __future__ import annotations

from typing import NamedTuple

from gptj_model.errors import ConfigError, DataFault
from runner.config.params import InputParams
from runner.data.reading.records import count_records, find_records


class Place(NamedTuple):
    """The next record that a run reads.

    It counts records rather than batches, so a run may resume with another batch size.
    """

    epoch: int = 0
    """Number of whole passes over the records before it."""
    record: int = 0
    """Number of records of this epoch that were read, in the order of the epoch's shuffle."""

    def after(self, batches: int, *, size: int, records: int) -> Place:
        """Return the place after further batches.

        Args:
            batches: number of batches.
            size: records per batch.
            records: records per epoch, at least one batch; the incomplete last batch is skipped.
        """
        left = max(records - self.record, 0) // size
        if batches <= left:
            return Place(self.epoch, self.record + batches * size)
        epoch, within = divmod(batches - left - 1, records // size)
        return Place(self.epoch + 1 + epoch, (within + 1) * size)


def check_shares(params: InputParams, workers: int) -> None:
    """Check that workers can divide every batch among them.

    Raises:
        ConfigError: batch_size is not a multiple of the number of workers.
    """
    if params.batch_size % workers:
        raise ConfigError(
            f"batch_size is {params.batch_size}, expected a multiple of the number of workers, "
            f"{workers}"
        )


def place_after(params: InputParams, batches: int) -> Place:
    """Return the place after the first batches of a section.

    Args:
        params: section train_input or eval_input.
        batches: number of batches.

    Raises:
        UsageError: there are no records.
        DataFault: the files differ from data_params.json, or hold fewer records than a batch.
    """
    if not batches:
        return Place()  # without counting the records
    records = count_records(find_records(params.data_dir))
    whole_batches(params, records)
    return Place().after(batches, size=params.batch_size, records=records)


def whole_batches(params: InputParams, records: int) -> int:
    """Return the number of batches in `records` records, at least one.

    Raises:
        DataFault: there are fewer records than a batch.
    """
    size = params.batch_size
    if records < size:
        where = ", ".join(params.data_dir)
        raise DataFault(
            f"{where}: holds {records} records, expected at least one batch of {size}",
            hint="choose a smaller batch_size",
        )
    return records // size
