"""Arrays that a step keeps on the disk until it is done."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.formats.output_file import FULL
from gptj_model.errors import FileFault
from gptj_model.source import raw_bytes


class Scratch:
    """Arrays by key in a file that has no name: whatever ends the process, nothing is left of it.

    A key's array may be replaced by one of the same size.

    Args:
        folder: on whose disk it is.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._places: dict[Hashable, tuple[int, tuple[int, ...], Any]] = {}
        self._end = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    def put(self, key: Hashable, values: np.ndarray) -> None:
        """Keep an array.

        Raises:
            FileFault: the disk is full or not writable.
        """
        if key not in self._places:
            self._places[key] = self._end, values.shape, values.dtype
            self._end += values.nbytes
        begin, _, dtype = self._places[key]
        assert values.dtype == dtype, "one key, one kind of array"
        raw, done = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, 0
        try:
            while done < len(raw):
                done += os.pwrite(self._file.fileno(), raw[done:], begin + done)
        except OSError as e:
            raise self._fault(e) from None

    def get(self, key: Hashable, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of the first axis (None: to the end) of an array that was kept.

        Raises:
            FileFault: the disk cannot be read.
        """
        begin, shape, dtype = self._places[key]
        stop = shape[0] if stop is None else stop
        values = np.empty((stop - start, *shape[1:]), dtype)
        raw, done = raw_bytes(values), 0
        begin += start * (values.nbytes // max(1, stop - start))
        try:
            while done < len(raw):
                got = os.preadv(self._file.fileno(), [raw[done:]], begin + done)
                if not got:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                done += got
        except OSError as e:
            raise self._fault(e) from None
        return values

    def close(self) -> None:
        """Give its space back."""
        self._file.close()

    def _fault(self, error: OSError) -> FileFault:
        hint = "put --model-dir on a disk with more space" if error.errno in FULL else None
        what = f"{self._end / 1e9:.2f} GB of a step's arrays"
        return FileFault(f"{self._folder}: {what} cannot be kept: {error.strerror}", hint=hint)
