"""HDF5 files of plain datasets, read by ranges.

h5py is asked for the datasets' places only; links that lead elsewhere, other storage than one
run of bytes, and other types than numbers are refused before anything is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from gptj_convert.formats.ranged_file import DOWNLOAD_HINT, RangedFile
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo

#: A GPT-J of 28 blocks has 285 datasets in 560 groups, four deep.
MAX_OBJECTS = 2**14
MAX_DEPTH = 16
#: Of a dataset whose numpy type cannot tell: Keras stores bfloat16 as two opaque bytes.
DTYPE_ATTRIBUTE = "dtype"
_NAMES = {dtype: name for name, dtype in NUMPY.items() if name != "bfloat16"}


class Hdf5Source:
    """The datasets of one file by their paths, as `gptj_model.source.TensorSource`.

    Raises:
        FileFault: it is not an HDF5 file, or holds what is not a plain dataset of numbers.
    """

    def __init__(self, path: Path) -> None:
        self._file = RangedFile(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        self._seen = 0
        try:
            with h5py.File(path, "r") as file:
                for name, dataset in self._datasets(file, "", MAX_DEPTH):
                    self._add(name, dataset)
        except FileFault:
            self._file.close()
            raise
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as e:
            self._file.close()
            reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
            raise FileFault(
                f"{path}: cannot be read as HDF5: {reason}", hint=DOWNLOAD_HINT
            ) from None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        self._file.read_into(self._offsets[name] + offset, buffer, f"dataset {name!r}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _datasets(
        self, group: h5py.Group, prefix: str, depth: int
    ) -> Iterator[tuple[str, h5py.Dataset]]:
        for key in group:
            name = f"{prefix}{key}"
            self._seen += 1
            if self._seen > MAX_OBJECTS:
                raise FileFault(f"{self._file.path}: holds more than {MAX_OBJECTS} objects")
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise FileFault(f"{self._file.path}: {name!r} is a link, expected a dataset")
            item = group[key]
            if isinstance(item, h5py.Dataset):
                yield name, item
            elif isinstance(item, h5py.Group) and depth:
                yield from self._datasets(item, f"{name}/", depth - 1)
            else:
                raise FileFault(f"{self._file.path}: {name!r} is not a dataset or too deep")

    def _add(self, name: str, dataset: h5py.Dataset) -> None:
        where = f"{self._file.path}: dataset {name!r}"
        dtype = _dtype_name(dataset)
        if dtype is None:
            raise FileFault(f"{where}: holds {str(dataset.dtype)[:100]}, expected numbers")
        if dataset.external or dataset.is_virtual or dataset.chunks or dataset.compression:
            raise FileFault(f"{where}: is not stored as one run of bytes in this file")
        shape = dataset.shape
        if shape is None or math.prod(max(n, 1) for n in shape) * 8 >= 2**63:
            raise FileFault(f"{where}: has shape {shape}, expected that of a tensor")
        info = TensorInfo(dtype, shape)
        offset = dataset.id.get_offset()
        if info.nbytes and (offset is None or offset + info.nbytes > self._file.size):
            raise FileFault(
                f"{where}: needs {info.nbytes} bytes from {offset}, which the file of "
                f"{self._file.size} bytes does not hold",
                hint=DOWNLOAD_HINT,
            )
        self.tensors[name], self._offsets[name] = info, offset or 0


def _dtype_name(dataset: h5py.Dataset) -> str | None:
    if dataset.dtype == np.dtype("V2"):
        stated = dataset.attrs.get(DTYPE_ATTRIBUTE)
        return "bfloat16" if stated in ("bfloat16", b"bfloat16") else None
    return _NAMES.get(dataset.dtype)
