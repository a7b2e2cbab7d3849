"""The layout of the CS client: `model.mdl`, an HDF5 file in the form of cerebras-pytorch 2.10.

Each tensor is a dataset at the root, named `model.` and the tensor's name. Attributes of the file
describe the structure of the tree, and the storage of each of its leaves. The client's own files
have chunked datasets, and those of its runs have `model.` twice in the names; both are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptj_convert.formats.containers.layout import Layout
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, read_tensor

MODEL_FILE = "model.mdl"
SUFFIX = ".mdl"
#: File name of a run's checkpoint, `checkpoint_N.mdl`, where N is the step.
_RUN_FILE = re.compile(r"checkpoint_(\d+)\.mdl", re.ASCII)

#: Top-level key of the model's state, with which every name of a tensor begins.
_MODEL = "model"
_CLIENT_VERSION = "2.10.0"
_FORMAT_VERSION = 0.5
_SUCCESS = "__SUCCESS__"
#: Suffix of the name of a leaf's attribute.
_METADATA = ".__metadata__"
_SERIALIZER = "TorchTensorSerializer"

#: Most links that are followed. The client stores an object that occurs twice only once, and links
#: to it.
_MAX_LINKS = 8

#: Number of each dtype in the client's protocol.
_RTFX = {"float16": 10, "bfloat16": 15, "float32": 11, "float64": 12, "int64": 5}
#: Type of the datasets in which the client stores the bits of bfloat16.
_BFLOAT16 = np.dtype(np.int16)

Tree = Mapping[str, Any]


def cs_layout(tensors: Mapping[str, TensorInfo], state: Tree | None = None) -> Layout:
    """Return the layout of a model.mdl.

    Args:
        tensors: tensors of the model, by the table's CS names.
        state: state beside the model, such as an optimizer's, by top-level key: dicts, lists and
            tuples whose leaves are tensors and numbers. The name of such a tensor is its path.
    """
    from gptj_convert.formats.containers.hdf5 import make_skeleton, skeleton_layout

    tree = {_MODEL: dict(tensors), **(state or {})}
    leaves = dict(_leaves(tree))
    paths = {f"{_MODEL}.{name}": name for name in tensors}
    infos = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TensorInfo)}
    datasets = {
        path: (info, _BFLOAT16 if info.dtype == "bfloat16" else NUMPY[info.dtype])
        for path, info in infos.items()
    }
    of_file: dict[str, Any] = {
        "__spec__": _dump(_spec(tree)),
        "__version__": _FORMAT_VERSION,
        "__cstorch_version__": _CLIENT_VERSION,
        _SUCCESS: True,
    }
    of_file |= {f"{path}{_METADATA}": _dump(_leaf(path, leaf)) for path, leaf in leaves.items()}
    attributes: dict[str, Mapping[str, Any]] = {"": of_file}
    attributes |= {path: _stored(info) for path, info in infos.items()}

    def make(path: str) -> dict[str, int]:
        offsets = make_skeleton(path, datasets, attributes)
        return {paths.get(name, name): offset for name, offset in offsets.items()}

    return skeleton_layout(MODEL_FILE, {paths.get(n, n): i for n, i in infos.items()}, make)


def _dump(values: Any) -> str:
    return json.dumps(values, indent=4)


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each leaf of a tree with its path."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


def _spec(tree: Tree) -> list[Any]:
    """Return the structure of a tree, once with stars as leaves and once in torch's pytree form."""
    return [_stars(tree), json.dumps([1, _node(tree)])]


def _stars(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _stars(value) for key, value in tree.items()}
    return [_stars(value) for value in tree] if isinstance(tree, list | tuple) else "*"


def _node(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict | list | tuple):
        return {"type": None, "context": None, "children_spec": []}
    keys = list(tree) if isinstance(tree, dict) else None
    return {
        "type": f"builtins.{type(tree).__name__}",
        "context": json.dumps(keys),
        "children_spec": [_node(v) for v in (tree.values() if isinstance(tree, dict) else tree)],
    }


def _leaf(path: str, leaf: TensorInfo | float) -> dict[str, Any]:
    """Return the client's description of one leaf of the tree."""
    stored = _stored(leaf) if isinstance(leaf, TensorInfo) else _number(leaf)
    return {
        "__spec__": _spec({path: leaf}),
        "__objects__": [path],
        f"{path}{_METADATA}": stored,
    }


def _number(value: float) -> dict[str, Any]:
    return {"scalar_value": value, "__TYPE__": "ScalarSerializer", "__NONE__": True}


def _stored(info: TensorInfo) -> dict[str, Any]:
    """Return the attributes that describe the storage of a tensor, in the file and its dataset."""
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
    """Tensors of a file by the table's CS names, as a `TensorSource`.

    Tensors outside the model, such as an optimizer's state, keep their full names.

    Raises:
        FileFault: `Hdf5Source` refuses the file, or the client did not finish it.
    """

    def __init__(self, path: Path) -> None:
        from gptj_convert.formats.containers.hdf5 import Hdf5Source

        self._file = Hdf5Source(path, dtype_of=_dtype, in_chunks=True)
        if not self._file.attribute(_SUCCESS):
            self._file.close()
            raise FileFault(
                f"{path}: is incomplete, because its attribute {_SUCCESS} is not set",
                hint="use the previous checkpoint",
            )
        self._paths = {_name(dataset): dataset for dataset in self._file.tensors}
        self.tensors = {name: self._file.tensors[d] for name, d in self._paths.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `TensorSource.read_into`."""
        self._file.read_into(self._paths[name], offset, buffer)

    def number(self, path: str) -> float | None:
        """Return a number of the tree, stored as such or as a tensor; None if it does not exist.

        Raises:
            FileFault: the value at this path is not a number.
        """
        for _ in range(_MAX_LINKS):
            if path in self._file.tensors:
                if math.prod(self._file.tensors[path].shape) != 1:
                    break
                return read_tensor(self._file, path).item()
            text = self._file.text(f"{path}{_METADATA}")
            if text is None:
                return None
            try:
                stored = json.loads(text)[f"{path}{_METADATA}"]
                if stored.get("__LINKED__"):
                    path = str(stored["key"])
                    continue
                return float(stored["scalar_value"])
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                break
        raise FileFault(f"{self._file.path}: {path!r} does not hold one number")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _name(dataset: str) -> str:
    for prefix in (f"{_MODEL}.{_MODEL}.", f"{_MODEL}."):
        if dataset.startswith(prefix):
            return dataset.removeprefix(prefix)
    return dataset


def _dtype(dataset: Any) -> str | None:
    """Return "bfloat16" for a dataset of integers with that attribute, otherwise None."""
    if dataset.dtype != _BFLOAT16:
        return None
    stated = dataset.attrs.get("dtypes")
    names = [] if stated is None else [str(name) for name in np.atleast_1d(stated)]
    return "bfloat16" if names == ["torch.bfloat16"] else None


def find_weights(path: Path) -> Path | None:
    """Return the weight file at `path`, or in it if it is a folder; None if there is none.

    In a folder, `model.mdl` comes first, then a run's newest checkpoint.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    return newest(path)


def newest(folder: Path) -> Path | None:
    """Return a run's checkpoint with the highest step, or None if the folder has none."""
    if not folder.is_dir():
        return None
    matches = ((_RUN_FILE.fullmatch(p.name), p) for p in folder.iterdir())
    steps = {int(m[1]): p for m, p in matches if m}
    return steps[max(steps)] if steps else None
