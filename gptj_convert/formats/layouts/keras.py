"""The Keras layout: `model.weights.h5`, and `model.keras`, which `load_model` opens.

The HDF5 file is made empty first, of its full size but without data; what h5py wrote into it
tells every dataset's place, and the conversion streams the values there.
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

#: Keras stores bfloat16 as two opaque bytes, and says so in an attribute.
_BFLOAT16 = np.dtype("V2")
_DTYPE = "dtype"

#: Whose layout this is. Keras itself is not needed to write it.
_VERSION = "3.15.1"
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
    """The weights file; its tensors go by the table's Keras names."""
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
    return zipfile.ZipInfo(name)  # with the format's first date


class KerasSource:
    """The tensors of a weights file by the table's Keras names, as a `TensorSource`.

    Raises:
        FileFault: see `Hdf5Source`.
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
    """bfloat16, if a dataset of opaque values says so."""
    stated = dataset.dtype == _BFLOAT16 and dataset.attrs.get(_DTYPE)
    return "bfloat16" if stated in ("bfloat16", b"bfloat16") else None


def find_weights(path: Path) -> Path | None:
    """The weights file that `path` is or, if it is a folder, holds."""
    if path.is_file():
        return path if path.suffix == ".h5" else None
    return path / WEIGHTS_FILE if (path / WEIGHTS_FILE).is_file() else None
