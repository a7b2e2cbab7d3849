"""The Keras layout: `model.weights.h5`, and `model.keras`, which `load_model` opens.

The HDF5 file is made empty first, of its full size but without data; what h5py wrote into it
tells every dataset's place, and the conversion streams the values there.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from gptj_convert.formats.layout import FileLayout, Layout
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.source import TensorInfo
from gptj_model.tensors import HEAD_BIAS, HEAD_WEIGHT

WEIGHTS_FILE = "model.weights.h5"
MODEL_FILE = "model.keras"

#: Groups that Keras makes of the model's attributes, by the first part of a variable's path.
_GROUPS = {
    "wte": "layers/embedding",
    "ln_f": "layers/layer_normalization",
    "lm_head": "layers/head",
}
#: The variables of a layer in the order Keras numbers them, by the end of the layer's path.
_VARIABLES = {
    "wte": ("embeddings",),
    "ln_1": ("gamma", "beta"),
    "ln_f": ("gamma", "beta"),
    "q_proj": ("kernel",),
    "k_proj": ("kernel",),
    "v_proj": ("kernel",),
    "out_proj": ("kernel",),
    "fc_in": ("kernel", "bias"),
    "fc_out": ("kernel", "bias"),
    "lm_head": ("kernel", "bias"),
}
_PATH = re.compile(r"(layers/\w+|blocks/block(?:_(\d+))?)(?:/(.+))?/vars/(\d)", re.ASCII)
_HEAD_KERNEL = HEAD_WEIGHT.keras

#: Bytes that are copied at once.
_PIECE = 8 * 2**20


def dataset_path(name: str, *, tied: bool) -> str:
    """Where Keras keeps a variable in a weights file, by the table's Keras name."""
    layer, _, variable = name.rpartition("/")
    first, _, rest = layer.partition("/")
    group = _GROUPS.get(first)
    if group is None:  # a block: the first has no number
        number = first.removeprefix("h_")
        group = "blocks/block" + ("" if number == "0" else f"_{number}")
    return "/".join(
        filter(None, (group, rest, "vars", str(_variables(layer, tied).index(variable))))
    )


def variable_name(path: str, *, tied: bool) -> str:
    """The inverse of `dataset_path`; a path that no GPT-J has is given back as it is."""
    found = re.fullmatch(
        r"(layers/\w+|blocks/block(?:_(\d+))?)(?:/(.+))?/vars/(\d)", path, re.ASCII
    )
    if not found:
        return path
    group, number, rest, index = found.groups()
    first = {g: layer for layer, g in _GROUPS.items()}.get(group)
    layer = "/".join(filter(None, (first or f"h_{number or 0}", rest)))
    variables = _variables(layer, tied)
    return f"{layer}/{variables[int(index)]}" if int(index) < len(variables) else path


def _variables(layer: str, tied: bool) -> tuple[str, ...]:
    variables = _VARIABLES.get(layer.rpartition("/")[2], ())
    return variables[1:] if tied and layer == "lm_head" else variables


def keras_layout(tensors: Mapping[str, TensorInfo]) -> Layout:
    """The weights file; its tensors go by the table's Keras names."""
    tied = _HEAD_KERNEL not in tensors
    names = {dataset_path(name, tied=tied): name for name in tensors}
    with tempfile.NamedTemporaryFile(suffix=".h5") as skeleton:
        _make_skeleton(skeleton.name, {p: tensors[n] for p, n in names.items()})
        places = sorted(_places(skeleton.name, names))
        size = Path(skeleton.name).stat().st_size
        parts: list[bytes | str] = []
        ends = [0, *(begin + tensors[name].nbytes for begin, name in places)]
        begins = [*(begin for begin, _ in places), size]
        for n, (end, begin) in enumerate(zip(ends, begins, strict=True)):
            skeleton.seek(end)
            parts.append(skeleton.read(begin - end))
            if n < len(places):
                parts.append(places[n][1])
    assert all(a <= b for a, b in pairwise(begins))
    return Layout(tensors, (FileLayout(WEIGHTS_FILE, tuple(parts)),), lambda checksums: {})


def write_model(folder: Path, config: GPTJConfig, dtype: str) -> None:
    """Write `model.keras`: the weights file of the folder and how to make the model, in one.

    `import gptj_model.model` makes the class known to `keras.saving.load_model`.
    """
    model = {
        "module": "gptj_model.model",
        "class_name": "GPTJ",
        "config": {"config": config.to_hf(dtype=dtype)},
        "registered_name": "gptj>GPTJ",
    }
    # No date: the same source gives the same bytes.
    metadata = {"keras_version": importlib.metadata.version("keras")}
    with (
        zipfile.ZipFile(folder / MODEL_FILE, "w", zipfile.ZIP_STORED) as archive,
        (folder / WEIGHTS_FILE).open("rb", buffering=0) as weights,
    ):
        archive.writestr(_entry("config.json"), json.dumps(model))
        archive.writestr(_entry("metadata.json"), json.dumps(metadata))
        with archive.open(_entry(WEIGHTS_FILE), "w", force_zip64=True) as out:
            while piece := weights.read(_PIECE):
                out.write(piece)


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name)  # with the format's first date


def _make_skeleton(path: str, datasets: Mapping[str, TensorInfo]) -> None:
    """An HDF5 file whose datasets have their places but no values."""
    import h5py
    from h5py import h5d, h5p, h5s, h5t

    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        for name, info in datasets.items():
            group = file.require_group(name.rpartition("/")[0])
            creation = h5p.create(h5p.DATASET_CREATE)
            creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
            creation.set_fill_time(h5d.FILL_TIME_NEVER)
            creation.set_obj_track_times(False)
            is_bfloat16 = info.dtype == "bfloat16"
            kind = h5t.py_create("V2" if is_bfloat16 else NUMPY[info.dtype])
            space = h5s.create_simple(info.shape)
            h5d.create(group.id, name.rpartition("/")[2].encode(), kind, space, creation)
            if is_bfloat16:
                file[name].attrs["dtype"] = "bfloat16"


def _places(path: str, names: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    import h5py

    with h5py.File(path, "r") as file:
        for dataset, name in names.items():
            yield file[dataset].id.get_offset(), name


class KerasSource:
    """The tensors of a weights file by the table's Keras names, as a `TensorSource`.

    Raises:
        FileFault: see `Hdf5Source`.
    """

    def __init__(self, path: Path) -> None:
        from gptj_convert.formats.hdf5 import Hdf5Source

        self._file = Hdf5Source(path)
        tied = dataset_path(HEAD_BIAS.keras, tied=False) not in self._file.tensors
        self._paths = {variable_name(p, tied=tied): p for p in self._file.tensors}
        self.tensors = {name: self._file.tensors[path] for name, path in self._paths.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        self._file.read_into(self._paths[name], offset, buffer)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def find_weights(path: Path) -> Path | None:
    """The weights file that `path` is or, if it is a folder, holds."""
    if path.is_file():
        return path if path.suffix == ".h5" else None
    return path / WEIGHTS_FILE if (path / WEIGHTS_FILE).is_file() else None
