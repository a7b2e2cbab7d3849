"""The Hugging Face layout: config.json, weights in one file or in shards, and tokenizer files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from gptj_convert.files.file_name import is_license
from gptj_convert.formats.containers import sharded
from gptj_convert.formats.containers.layout import FileLayout, Layout
from gptj_convert.formats.containers.safetensors import safetensors_file
from gptj_convert.formats.containers.sharded import INDEX_SUFFIX, ShardedSource
from gptj_convert.formats.containers.torch_archive import archive_file
from gptj_convert.options import FILE_FORMATS
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, TensorSource
from gptj_model.tensors import EMBEDDING, HEAD_WEIGHT

SAFETENSORS_FILE = FILE_FORMATS["safetensors"]
TORCH_FILE = FILE_FORMATS["bin"]
#: Suffixes of single weight files; torch.save writes those after the first.
WEIGHT_SUFFIXES = (sharded.SAFETENSORS, sharded.ARCHIVE, ".pt", ".pth", ".ckpt")
#: Names of weight files and of indices of shards, in the order of preference of transformers.
WEIGHT_FILES = (
    SAFETENSORS_FILE,
    SAFETENSORS_FILE + INDEX_SUFFIX,
    TORCH_FILE,
    TORCH_FILE + INDEX_SUFFIX,
)

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
#: Pairs of names for vocabulary and merges: those of transformers, and OpenAI's for GPT-2.
VOCABULARY_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
#: Tokenizer files that go with the weights, whatever the format of the weights.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    *(name for pair in VOCABULARY_FILES for name in pair),
    ADDED_TOKENS_FILE,
    SPECIAL_TOKENS_FILE,
)
GENERATION_FILE = "generation_config.json"
#: Names of a chat template's file; the second one is the older form, of processors.
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
#: Folder of further chat templates.
_CHAT_TEMPLATES = "additional_chat_templates"
#: Model card: metadata for the hub as YAML, and a text for people.
CARD_FILE = "README.md"
#: Suffixes of files that may hold settings of a model.
_SETTINGS = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")


def choose_companions(names: Iterable[str]) -> list[str]:
    """Return the files that go with the weights, whatever the format of the weights.

    Args:
        names: paths of the files in a folder, separated by `/`.
    """
    present = set(names)
    known = (*TOKENIZER_FILES, GENERATION_FILE, *CHAT_TEMPLATE_FILES)
    folder, pattern = f"{_CHAT_TEMPLATES}/", f"{_CHAT_TEMPLATES}/*.jinja"
    templates = (n for n in present if fnmatchcase(n, pattern) and "/" not in n[len(folder) :])
    return [*(name for name in known if name in present), *sorted(templates)]


def choose_documents(names: Iterable[str]) -> list[str]:
    """Return the files of a folder that say what may be done with the weights: licenses, and the
    model card.

    Args:
        names: paths of the files in the folder, separated by `/`.
    """
    return sorted(name for name in names if name == CARD_FILE or is_license(name))


def settings_files(folder: Path) -> list[str]:
    """Return the files in a folder that may hold settings of a model, as sorted relative paths."""
    paths = (*folder.glob("*"), *folder.glob(f"{_CHAT_TEMPLATES}/*"))
    return choose_settings(p.relative_to(folder).as_posix() for p in paths if p.is_file())


def choose_settings(names: Iterable[str]) -> list[str]:
    """Return the files that may hold settings of a model, sorted.

    Args:
        names: paths of the files in a folder, separated by `/`.
    """
    found: list[str] = []
    for name in names:
        path = PurePosixPath(name)
        is_setting = path.suffix in _SETTINGS or path.name in TOKENIZER_FILES
        if is_setting and str(path.parent) in (".", _CHAT_TEMPLATES) and name[0] != ".":
            found.append(name)
    return sorted(found)


def find_weights(path: Path) -> Path | None:
    """Return the weight file or index at `path`, or in it if it is a folder.

    Returns:
        The path, or None if there are no weights in a Hugging Face format.

    Raises:
        FileFault: `path` is one shard of several.
    """
    if path.is_file():
        if sharded.is_index(path.name):
            return path
        if (count := sharded.shards_of(path.name)) and count > 1:
            raise FileFault(
                f"{path}: is one of {count} shards, expected all of them",
                hint=f"name the folder that holds them and their index: {path.parent}",
            )
        return path if path.suffix in WEIGHT_SUFFIXES else None
    return next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)


def open_weights(path: Path) -> tuple[TensorSource, tuple[Path, ...]]:
    """Open a weight file, or the shards of an index; return the source and the files it reads."""
    if sharded.is_index(path.name):
        source = ShardedSource(path, tied=(EMBEDDING.hf, HEAD_WEIGHT.hf))
        return source, tuple(source.files)
    return sharded.open_file(path), (path,)


def hf_layout(
    tensors: Mapping[str, TensorInfo],
    max_shard_bytes: int | None = None,
    *,
    file: str = SAFETENSORS_FILE,
) -> Layout:
    """Return the layout of the weights: one file, or shards and their index.

    Args:
        tensors: tensors of the model, in order.
        max_shard_bytes: limit on the tensors of one shard, in bytes; None means one file.
        file: `SAFETENSORS_FILE` or `TORCH_FILE`.

    Raises:
        UsageError: there would be too many shards.
    """
    shards = sharded.split(tensors, file, max_shard_bytes)
    files = tuple(_weights_file(name, inside) for name, inside in shards.items())
    index = {file + INDEX_SUFFIX: sharded.index_text(shards).encode()}
    return Layout(tensors, files, lambda checksums: index if len(files) > 1 else {})


def _weights_file(name: str, tensors: Mapping[str, TensorInfo]) -> FileLayout:
    if name.endswith(".bin"):
        return archive_file(name, dict(zip(tensors, tensors, strict=True)), tensors)
    return safetensors_file(name, tensors, {"format": "pt"})  # required by transformers
