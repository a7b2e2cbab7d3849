"""HDF5 files of plain datasets, read by ranges.

h5py only locates the datasets. Links, datasets that are not stored as one run of bytes, and types
other than numbers are refused before anything is read.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gptj_convert.files.ranged_file import DOWNLOAD_HINT, RangedFile
from gptj_convert.formats.containers.layout import FileLayout, Layout
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, raw_bytes

#: A GPT-J of 28 blocks has 285 datasets in 560 groups, four deep.
MAX_OBJECTS = 2**14
MAX_DEPTH = 16
_NAMES = {dtype: name for name, dtype in NUMPY.items() if name != "bfloat16"}

Attributes = Mapping[str, Mapping[str, Any]]


class Hdf5Source:
    """Datasets of one file by their paths, as a `gptj_model.source.TensorSource`.

    Args:
        path: path of the file.
        dtype_of: function that returns the canonical dtype of a dataset whose numpy type does not
            tell it, or None.
        in_chunks: whether chunked datasets are accepted, too; h5py reads them.

    Raises:
        FileFault: the file is not HDF5, or holds something other than plain datasets of numbers.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype_of: Callable[[h5py.Dataset], str | None] = lambda dataset: None,
        in_chunks: bool = False,
    ) -> None:
        self._dtype_of = dtype_of
        self._in_chunks = in_chunks
        self._chunked: set[str] = set()
        self._opened: h5py.File | None = None
        self._file = RangedFile(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        self._seen = 0
        self._attributes: dict[str, Any] = {}
        try:
            with h5py.File(path, "r") as file:
                self._attributes = {k: file.attrs[k] for k in file.attrs if _is_plain(file, k)}
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
        if name in self._chunked:
            self._read_chunks(name, offset, buffer)
        else:
            self._file.read_into(self._offsets[name] + offset, buffer, f"dataset {name!r}")

    def attribute(self, name: str) -> Any:
        """Return a number among the attributes of the file, or None if no such number exists."""
        return self._attributes.get(name)

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self._file.path

    def text(self, name: str) -> str | None:
        """Return a text among the attributes of the file, or None if no such text exists.

        Raises:
            FileFault: the attribute cannot be read.
        """
        try:
            self._opened = self._opened or h5py.File(self._file.path, "r")
            found = self._opened.attrs.get(name)
        except (OSError, RuntimeError, ValueError, TypeError) as e:
            raise FileFault(
                f"{self._file.path}: attribute {name!r} cannot be read: "
                f"{str(e).splitlines()[0][:200]}",
                hint=DOWNLOAD_HINT,
            ) from None
        return found if isinstance(found, str) else None

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        if self._opened:
            self._opened.close()

    def _read_chunks(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a chunked dataset by reading the whole rows that contain the bytes."""
        info = self.tensors[name]
        row_bytes = info.nbytes // info.shape[0]
        first, end = offset // row_bytes, -(-(offset + len(buffer)) // row_bytes)
        try:
            self._opened = self._opened or h5py.File(self._file.path, "r")
            dataset = self._opened[name]
            assert isinstance(dataset, h5py.Dataset)
            rows = np.ascontiguousarray(dataset[first:end])
        except (OSError, RuntimeError, KeyError) as e:
            raise FileFault(
                f"{self._file.path}: dataset {name!r}, rows {first} to {end}: cannot be read: "
                f"{str(e).splitlines()[0][:200]}",
                hint=DOWNLOAD_HINT,
            ) from None
        begin = offset - first * row_bytes
        buffer[:] = raw_bytes(rows)[begin : begin + len(buffer)]

    def _datasets(
        self, group: h5py.Group, prefix: str, depth: int
    ) -> Iterator[tuple[str, h5py.Dataset]]:
        """Yield the datasets of a group and of the groups in it, with their paths."""
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
                raise FileFault(
                    f"{self._file.path}: {name!r} is neither a dataset nor a group within "
                    f"{MAX_DEPTH} levels"
                )

    def _add(self, name: str, dataset: h5py.Dataset) -> None:
        where = f"{self._file.path}: dataset {name!r}"
        dtype = self._dtype_of(dataset) or _NAMES.get(dataset.dtype)
        if dtype is None:
            raise FileFault(f"{where}: holds {str(dataset.dtype)[:100]}, expected numbers")
        chunked = self._in_chunks and dataset.chunks is not None
        other = dataset.external or dataset.is_virtual
        if other or (not chunked and (dataset.chunks or dataset.compression)):
            raise FileFault(f"{where}: is not stored as one contiguous range of bytes in this file")
        shape = dataset.shape
        if shape is None or math.prod(max(n, 1) for n in shape) * 8 >= 2**63:
            raise FileFault(f"{where}: has shape {shape}, expected that of a tensor")
        info = TensorInfo(dtype, shape)
        if chunked:
            self._check_filters(dataset, where)
            self.tensors[name] = info
            self._chunked.add(name)
            return
        offset = dataset.id.get_offset()
        if info.nbytes and (offset is None or offset + info.nbytes > self._file.size):
            raise FileFault(
                f"{where}: needs {info.nbytes} bytes from byte {offset} on, but the file has "
                f"{self._file.size}",
                hint=DOWNLOAD_HINT,
            )
        self.tensors[name], self._offsets[name] = info, offset or 0

    def _check_filters(self, dataset: h5py.Dataset, where: str) -> None:
        creation = dataset.id.get_create_plist()
        for n in range(creation.get_nfilters()):
            code, *_, name = creation.get_filter(n)
            if not _is_available(code):
                raise FileFault(
                    f"{where}: is compressed by {name.decode(errors='replace')[:40]!r}, which the "
                    "HDF5 library here cannot read",
                    hint="install the package hdf5plugin: `pip install 'gptj-tf[cs]'`",
                )
        if math.prod(dataset.shape) and not dataset.id.get_storage_size():
            raise FileFault(f"{where}: holds no values", hint=DOWNLOAD_HINT)


def _is_available(code: int) -> bool:
    """Return whether the HDF5 library has a filter, after importing hdf5plugin if it lacks it."""
    if not h5py.h5z.filter_avail(code) and importlib.util.find_spec("hdf5plugin"):
        importlib.import_module("hdf5plugin")
    return h5py.h5z.filter_avail(code)


def _is_plain(file: h5py.File, name: str) -> bool:
    """Return whether an attribute is a single number; any other may be of any size."""
    attribute = file.attrs.get_id(name)
    return attribute.shape == () and attribute.dtype.kind in "biuf"


def make_skeleton(
    path: str, datasets: Mapping[str, tuple[TensorInfo, Any]], attributes: Attributes
) -> dict[str, int]:
    """Create an HDF5 file whose datasets have space for their values, but no values.

    Args:
        path: path of the file.
        datasets: shape and dtype, and the numpy type for storage, by path of the dataset.
        attributes: attributes by path of the object, with "" for the file itself.

    Returns:
        Offset of each dataset's values in the file, in bytes.
    """
    from h5py import h5d, h5p, h5s, h5t

    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        for name, (info, stored) in datasets.items():
            group = file.require_group(name.rpartition("/")[0] or "/")
            creation = h5p.create(h5p.DATASET_CREATE)
            creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
            creation.set_fill_time(h5d.FILL_TIME_NEVER)
            creation.set_obj_track_times(False)
            space = h5s.create_simple(info.shape)
            leaf = name.rpartition("/")[2].encode()
            h5d.create(group.id, leaf, h5t.py_create(np.dtype(stored)), space, creation)
        for name, values in attributes.items():
            (file[name] if name else file).attrs.update(values)
    with h5py.File(path, "r") as file:
        return {name: file[name].id.get_offset() for name in datasets}


def skeleton_layout(
    name: str,
    tensors: Mapping[str, TensorInfo],
    make: Callable[[str], Mapping[str, int]],
) -> Layout:
    """Return the layout of one HDF5 file, derived from a skeleton of its full size.

    Args:
        name: name of the file.
        tensors: tensors in the file.
        make: function that creates the skeleton at a path, and returns the offset of every
            tensor's values.
    """
    with tempfile.NamedTemporaryFile(suffix=".h5") as skeleton:
        places = sorted((offset, tensor) for tensor, offset in make(skeleton.name).items())
        size = Path(skeleton.name).stat().st_size
        parts: list[bytes | str] = []
        ends = [0, *(begin + tensors[tensor].nbytes for begin, tensor in places)]
        begins = [*(begin for begin, _ in places), size]
        assert all(a <= b for a, b in pairwise(begins))
        for n, (end, begin) in enumerate(zip(ends, begins, strict=True)):
            skeleton.seek(end)
            parts.append(skeleton.read(begin - end))
            if n < len(places):
                parts.append(places[n][1])
    return Layout(tensors, (FileLayout(name, tuple(parts)),), lambda checksums: {})
