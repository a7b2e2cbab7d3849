"""The layout of the CS client: `model.mdl`, HDF5 as cerebras-pytorch 2.10 saves and loads it.

One dataset a tensor at the root, named `model.` and the tensor's name, and attributes that
describe the tree: of the file its shape, of every leaf how it is stored. The client's own files
lay datasets out in chunks, and a run's prefix the model's names once more; both are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.formats.layout import Layout
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo

MODEL_FILE = "model.mdl"
SUFFIX = ".mdl"
#: A run's checkpoints are `checkpoint_N.mdl`, N the step.
_RUN_FILE = re.compile(r"checkpoint_(\d+)\.mdl", re.ASCII)

#: Top-level key of the model's state, and so what every name begins with.
_MODEL = "model"
_CLIENT_VERSION = "2.10.0"
_FORMAT_VERSION = 0.5
_SUCCESS = "__SUCCESS__"
_SERIALIZER = "TorchTensorSerializer"

#: Numbers of element types in the client's protocol, by canonical dtype.
_RTFX = {"float16": 10, "bfloat16": 15, "float32": 11, "float64": 12}
#: How the client stores bfloat16: its bits, as integers.
_BFLOAT16 = np.dtype(np.int16)


def cs_layout(tensors: Mapping[str, TensorInfo]) -> Layout:
    """The file; its tensors go by the table's CS names."""
    from gptj_convert.formats.hdf5 import make_skeleton, skeleton_layout

    datasets = {
        f"{_MODEL}.{name}": (info, _BFLOAT16 if info.dtype == "bfloat16" else NUMPY[info.dtype])
        for name, info in tensors.items()
    }
    of_file: dict[str, Any] = {
        "__spec__": _dump(_spec({_MODEL: list(tensors)})),
        "__version__": _FORMAT_VERSION,
        "__cstorch_version__": _CLIENT_VERSION,
        _SUCCESS: True,
    }
    attributes: dict[str, Mapping[str, Any]] = {"": of_file}
    for path, (info, _) in datasets.items():
        of_file[f"{path}.__metadata__"] = _dump(_leaf(path, info))
        attributes[path] = _stored(info)

    def make(path: str) -> dict[str, int]:
        offsets = make_skeleton(path, datasets, attributes)
        return {name.removeprefix(f"{_MODEL}."): offset for name, offset in offsets.items()}

    return skeleton_layout(MODEL_FILE, tensors, make)


def _dump(values: Any) -> str:
    return json.dumps(values, indent=4)


def _spec(tree: Mapping[str, Sequence[str]]) -> list[Any]:
    """A dictionary of dictionaries of leaves, and the same as torch's pytree writes it."""
    leaf = {"type": None, "context": None, "children_spec": []}

    def node(keys: Sequence[str], children: list[Any]) -> dict[str, Any]:
        return {
            "type": "builtins.dict",
            "context": json.dumps(list(keys)),
            "children_spec": children,
        }

    inner = [node(names, [leaf] * len(names)) for names in tree.values()]
    stars = {key: dict.fromkeys(names, "*") for key, names in tree.items()}
    return [stars, json.dumps([1, node(list(tree), inner)])]


def _leaf(path: str, info: TensorInfo) -> dict[str, Any]:
    """The client's word on one leaf of the tree."""
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {"type": "builtins.dict", "context": json.dumps([path]), "children_spec": [leaf]}
    return {
        "__spec__": [{path: "*"}, json.dumps([1, spec])],
        "__objects__": [path],
        f"{path}.__metadata__": _stored(info),
    }


def _stored(info: TensorInfo) -> dict[str, Any]:
    """How a leaf is stored: said in the file's attributes and in the dataset's."""
    return {
        "__TORCH__": True,
        "shapes": [list(info.shape)],
        "dtypes": [f"torch.{info.dtype}"],
        "rtfx_dtypes": [_RTFX[info.dtype]],
        "__TYPE__": _SERIALIZER,
        "__NUMPY__": True,
        "compressed": False,
    }


class CsSource:
    """The tensors of a file by the table's CS names, as a `TensorSource`.

    What is no tensor of the model, such as an optimizer's state, keeps its full name.

    Raises:
        FileFault: see `Hdf5Source`; or the client has not finished the file.
    """

    def __init__(self, path: Path) -> None:
        from gptj_convert.formats.hdf5 import Hdf5Source

        self._file = Hdf5Source(path, dtype_of=_dtype, in_chunks=True)
        if not self._file.attribute(_SUCCESS):
            self._file.close()
            raise FileFault(
                f"{path}: was not written to its end, says its own attribute {_SUCCESS}",
                hint="take the checkpoint before it",
            )
        self._paths = {_name(dataset): dataset for dataset in self._file.tensors}
        self.tensors = {name: self._file.tensors[d] for name, d in self._paths.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        self._file.read_into(self._paths[name], offset, buffer)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _name(dataset: str) -> str:
    for prefix in (f"{_MODEL}.{_MODEL}.", f"{_MODEL}."):
        if dataset.startswith(prefix):
            return dataset.removeprefix(prefix)
    return dataset


def _dtype(dataset: Any) -> str | None:
    """bfloat16, if a dataset of integers says so."""
    if dataset.dtype != _BFLOAT16:
        return None
    stated = dataset.attrs.get("dtypes")
    names = [] if stated is None else [str(name) for name in np.atleast_1d(stated)]
    return "bfloat16" if names == ["torch.bfloat16"] else None


def find_weights(path: Path) -> Path | None:
    """The file that `path` is or, if it is a folder, holds: `model.mdl`, else a run's newest."""
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    if not path.is_dir():
        return None
    matches = ((_RUN_FILE.fullmatch(p.name), p) for p in path.iterdir())
    steps = {int(m[1]): p for m, p in matches if m}
    return steps[max(steps)] if steps else None
