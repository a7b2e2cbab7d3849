"""Training records in HDF5, the format of the current CS client.

A file holds the dataset `data`, int32 of shape (examples, 3, tokens) with ids, mask (1 on real
tokens) and labels, in one chunk per example. The attribute `n_examples` is their number.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from gptj_model.errors import DataFault
from runner.data.reading.example import FEATURES
from runner.data.reading.records import check_example

PATTERN = "*.h5"
DATASET = "data"
COUNT = "n_examples"

#: Largest number of tokens of an example, and of the examples that are read together.
_LONGEST = 2**20
_TOGETHER = 2**20


class Hdf5Writer:
    """Writes one HDF5 file.

    Args:
        path: path of the file, which must not exist.
        length: number of tokens per example.

    Raises:
        OSError: the file exists, or writing fails.
    """

    def __init__(self, path: Path, length: int) -> None:
        self._path = path
        self._count = 0
        self._file = h5py.File(path, "x")
        shape = (0, 3, length)
        self._data = self._file.create_dataset(
            DATASET, shape, np.int32, maxshape=(None, 3, length), chunks=(1, 3, length)
        )

    def write(self, block: np.ndarray) -> None:
        """Append a block of examples, int32 of shape (examples, 3, tokens)."""
        end = self._count + len(block)
        self._data.resize(end, axis=0)
        self._data[self._count : end] = block
        self._count = end

    def close(self) -> None:
        """Close the file and sync it to the disk."""
        self._file.attrs[COUNT] = self._count
        self._file.close()
        with self._path.open("rb+") as f:
            os.fsync(f.fileno())

    def discard(self) -> None:
        """Close the file without completing it."""
        self._file.close()


def read_blocks(path: Path, *, most: int = 256) -> Iterator[np.ndarray]:
    """Yield the examples of a file in blocks of at most `most`.

    Raises:
        DataFault: the file is not an HDF5 file of records.
    """
    try:
        with h5py.File(path) as file:
            data, stated = file[DATASET], np.asarray(file.attrs[COUNT])
            if not isinstance(data, h5py.Dataset) or data.ndim != 3 or data.shape[1] != 3:
                raise DataFault(f"{path}: {DATASET!r} is not of shape (examples, 3, tokens)")
            if data.dtype.kind not in "iu" or not 0 < data.shape[2] <= _LONGEST:
                what = f"{data.dtype} of {data.shape[2]} tokens"
                raise DataFault(
                    f"{path}: {DATASET!r} holds {what}, expected int32 of 1 to {_LONGEST}"
                )
            if stated.size != 1 or stated.item() != len(data):
                raise DataFault(f"{path}: holds {len(data)} examples, {COUNT} says {stated}")
            most = max(1, min(most, _TOGETHER // data.shape[2]))
            for start in range(0, len(data), most):
                yield data[start : start + most]
    except DataFault:
        raise
    except (OSError, KeyError, RuntimeError, ValueError) as e:
        raise DataFault(f"{path}: is not a file of records: {e}") from None


def read_checked(path: Path, *, length: int | None, vocab_size: int) -> Iterator[np.ndarray]:
    """Yield the examples of a file in blocks, checked against the model.

    Args:
        path: file of records.
        length: number of tokens per example; None accepts that of the file.
        vocab_size: upper bound of ids, exclusive.

    Raises:
        DataFault: an example is invalid; with its number and its offset.
    """
    number = 0
    for block in read_blocks(path):
        rows, size = block[:, (0, 2)], length or block.shape[2]
        good = size == block.shape[2] and rows.min() >= 0 and rows.max() < vocab_size
        if not good or block[:, 1].min() < 0 or block[:, 1].max() > 1:
            for n, example in enumerate(block, start=number):
                place = f"{path}: record {n} at byte {_offset(path, n)}"
                check_example(dict(zip(FEATURES, example, strict=True)), size, vocab_size, place)
        number += len(block)
        yield block


def _offset(path: Path, number: int) -> int | str:
    with h5py.File(path) as file:
        data = file[DATASET]
        assert isinstance(data, h5py.Dataset)
        if data.chunks and data.chunks[0] == 1:
            return data.id.get_chunk_info_by_coord((number, 0, 0)).byte_offset
    return "?"
