"""The Keras layout: `model.weights.h5`, and `model.keras`, which `load_model` opens.

The HDF5 file is made empty first, of its full size but without data; what h5py wrote into it
tells every dataset's place, and the conversion streams the values there.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from gptj_convert.formats.layout import FileLayout, Layout
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.source import TensorInfo
from gptj_model.tensors import table

WEIGHTS_FILE = "model.weights.h5"
MODEL_FILE = "model.keras"

#: Groups that Keras makes of the model's attributes, by the first part of a variable's path.
_GROUPS = {
    "wte": "layers/embedding",
    "ln_f": "layers/layer_normalization",
    "lm_head": "layers/head",
}
#: Bytes that are copied at once.
_PIECE = 8 * 2**20


def dataset_paths(config: GPTJConfig) -> dict[str, str]:
    """Where Keras keeps each variable in a weights file, by the table's Keras name."""
    found: dict[str, str] = {}
    for tensor in table(config):
        layer = tensor.keras.rpartition("/")[0]
        first, _, rest = layer.partition("/")
        group = _GROUPS.get(first)
        if group is None:  # a block: the first has no number
            number = first.removeprefix("h_")
            group = "blocks/block" + ("" if number == "0" else f"_{number}")
        vars_ = "/".join(filter(None, (group, rest, "vars")))
        found[tensor.keras] = f"{vars_}/{sum(p.startswith(f'{vars_}/') for p in found.values())}"
    return found


def keras_layout(config: GPTJConfig, tensors: Mapping[str, TensorInfo]) -> Layout:
    """The weights file; its tensors go by the table's Keras names."""
    names = {path: name for name, path in dataset_paths(config).items()}
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
        zipfile.ZipFile(folder / MODEL_FILE, "x", zipfile.ZIP_STORED) as archive,
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
