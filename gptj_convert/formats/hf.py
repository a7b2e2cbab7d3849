"""The Hugging Face layout: config.json, one weight file, tokenizer files, in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gptj_convert.formats.layout import Layout
from gptj_convert.formats.pickle import open_pickle
from gptj_convert.formats.safetensors import SafetensorsSource, safetensors_file
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, TensorSource

SAFETENSORS_FILE = "model.safetensors"
PICKLE_FILE = "pytorch_model.bin"
#: In the order they are preferred.
WEIGHT_FILES = (SAFETENSORS_FILE, PICKLE_FILE)
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)

#: Files that go with the weights whatever their format.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
GENERATION_FILE = "generation_config.json"


def find_weights(path: Path) -> Path | None:
    """The weight file that `path` is or, if it is a folder, holds; None when it is not HF's.

    Raises:
        FileFault: the folder's weights are in a form that is not read.
    """
    if path.is_file():
        return path if path.suffix in (".safetensors", ".bin") else None
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    for name in INDEX_FILES:
        if (path / name).is_file():
            raise FileFault(
                f"{path / name}: the weights are in shards, expected one file of "
                f"{' or '.join(WEIGHT_FILES)}",
                hint="save it in one file with transformers: "
                "model.save_pretrained(DIR, max_shard_size='100GB')",
            )
    return None


def open_weights(path: Path) -> TensorSource:
    """Open a weight file by its kind."""
    return SafetensorsSource(path) if path.suffix == ".safetensors" else open_pickle(path)


def hf_layout(tensors: Mapping[str, TensorInfo]) -> Layout:
    """The weight file of a folder. transformers asks for the `format` entry."""
    file = safetensors_file(SAFETENSORS_FILE, tensors, {"format": "pt"})
    return Layout(tensors, (file,), lambda checksums: {})
