"""The Keras layout: `model.weights.h5`, and `model.keras`, which `load_model` opens.

h5py first creates the HDF5 file at its full size but without values; the conversion then streams
the values to the place of each dataset.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.formats.containers.layout import Layout
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.source import TensorInfo
from gptj_model.tensors import HEAD_BIAS, HEAD_WEIGHT

WEIGHTS_FILE = "model.weights.h5"
MODEL_FILE = "model.keras"

#: Group in the HDF5 file of each layer outside the blocks, by the first part of a variable's path.
_GROUPS = {
    "wte": "layers/embedding",
    "ln_f": "layers/layer_normalization",
    "lm_head": "layers/head",
}
#: Variables of a layer in the order in which Keras numbers them, by the last part of its path.
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
#: Path of a dataset: group with the number of the block, path of the layer in it, number of the
#: variable.
_PATH = re.compile(r"(layers/\w+|blocks/block(?:_(\d+))?)(?:/(.+))?/vars/(\d)", re.ASCII)
_HEAD_KERNEL = HEAD_WEIGHT.keras

#: Type of the datasets in which Keras stores bfloat16, opaque pairs of bytes; an attribute names
#: the dtype.
_BFLOAT16 = np.dtype("V2")
_DTYPE = "dtype"

#: Version of Keras whose layout is written, without Keras itself.
_VERSION = "3.15.1"
#: Number of bytes that are copied at once.
_PIECE = 8 * 2**20


def dataset_path(name: str, *, tied: bool) -> str:
    """Return the path of a variable in a weights file.

    Args:
        name: Keras name of the variable in the table.
        tied: whether the head has no kernel of its own.
    """
    layer, _, variable = name.rpartition("/")
    first, _, rest = layer.partition("/")
    group = _GROUPS.get(first)
    if group is None:  # a block; the first one has no number
        number = first.removeprefix("h_")
        group = "blocks/block" + ("" if number == "0" else f"_{number}")
    return "/".join(
        filter(None, (group, rest, "vars", str(_variables(layer, tied).index(variable))))
    )


def variable_name(path: str, *, tied: bool) -> str:
    """Return the variable at a path: the inverse of `dataset_path`.

    A path that no GPT-J has is returned unchanged.
    """
    found = _PATH.fullmatch(path)
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
    """Return the layout of the weights file, for tensors with the table's Keras names."""
    from gptj_convert.formats.containers.hdf5 import make_skeleton, skeleton_layout

    tied = _HEAD_KERNEL not in tensors
    names = {dataset_path(name, tied=tied): name for name in tensors}
    is_bfloat16 = {path: tensors[name].dtype == "bfloat16" for path, name in names.items()}
    datasets = {
        path: (tensors[name], _BFLOAT16 if is_bfloat16[path] else NUMPY[tensors[name].dtype])
        for path, name in names.items()
    }
    attributes = {path: {_DTYPE: "bfloat16"} for path in names if is_bfloat16[path]}

    def make(path: str) -> dict[str, int]:
        offsets = make_skeleton(path, datasets, attributes)
        return {names[dataset]: offset for dataset, offset in offsets.items()}

    return skeleton_layout(WEIGHTS_FILE, tensors, make)


def write_model(folder: Path, config: GPTJConfig, dtype: str) -> None:
    """Write `model.keras`, an archive of the folder's weights file and the model's configuration.

    `import gptj_model.model` registers the class for `keras.saving.load_model`.

    Args:
        folder: folder of the weights file.
        config: configuration of the model.
        dtype: canonical dtype of the weights.
    """
    model = {
        "module": "gptj_model.model",
        "class_name": "GPTJ",
        "config": {"config": config.to_hf(dtype=dtype)},
        "registered_name": "gptj>GPTJ",
    }
    # Without a date, the same source gives the same bytes.
    metadata = {"keras_version": _VERSION}
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
    return zipfile.ZipInfo(name)  # with the earliest date of the format


class KerasSource:
    """Tensors of a weights file by the table's Keras names, as a `TensorSource`.

    Raises:
        FileFault: `Hdf5Source` refuses the file.
    """

    def __init__(self, path: Path) -> None:
        from gptj_convert.formats.containers.hdf5 import Hdf5Source

        self._file = Hdf5Source(path, dtype_of=_dtype)
        tied = dataset_path(HEAD_BIAS.keras, tied=False) not in self._file.tensors
        self._paths = {variable_name(p, tied=tied): p for p in self._file.tensors}
        self.tensors = {name: self._file.tensors[path] for name, path in self._paths.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        self._file.read_into(self._paths[name], offset, buffer)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _dtype(dataset: Any) -> str | None:
    """Return "bfloat16" for a dataset of opaque values with that attribute, otherwise None."""
    stated = dataset.dtype == _BFLOAT16 and dataset.attrs.get(_DTYPE)
    return "bfloat16" if stated in ("bfloat16", b"bfloat16") else None


def find_weights(path: Path) -> Path | None:
    """Return the weights file at `path`, or in it if it is a folder; None if there is none."""
    if path.is_file():
        return path if path.suffix == ".h5" else None
    return path / WEIGHTS_FILE if (path / WEIGHTS_FILE).is_file() else None
