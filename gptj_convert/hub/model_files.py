"""Choice of a GPT-J's files in a hub repository: one set of weights and the files beside it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

from gptj_convert.files.json_file import parse_json
from gptj_convert.formats.containers.sharded import MAX_INDEX_BYTES, is_index, parse_index
from gptj_convert.formats.layouts.hf import WEIGHT_FILES, choose_companions, choose_documents
from gptj_convert.hub.download import list_files
from gptj_convert.hub.listing import Contents, Listing
from gptj_model.config import CONFIG_FILE, GPTJConfig
from gptj_model.errors import ConfigError, FileFault, HubFault, TensorFault, UsageError

_log = logging.getLogger(__name__)

#: Limits on a config.json, which for a GPT-J has 1 kB.
MAX_CONFIG_BYTES = 2**20
MAX_CONFIG_MARKS = 2**15

#: Suffixes of weight files that an error lists.
_OTHER_WEIGHTS = (".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".pt", ".bin", ".safetensors")
_HINT = "name another repository, or with --revision another branch"


def list_model(
    repository: str, revision: str | None, folder: Path, *, for_conversion: bool = False
) -> Listing:
    """List one set of weights of a model and the small files beside it.

    The index of shards and config.json are downloaded for the choice: the first names the shards
    of a set, the second tells whether the model is a GPT-J.

    Args:
        repository: name of the repository, as OWNER/NAME.
        revision: branch, tag or commit; None is the main branch.
        folder: folder that the files will be downloaded to.
        for_conversion: whether a model that cannot be converted is refused; otherwise it is only
            noted.

    Raises:
        ConfigError: the model is not a GPT-J, and `for_conversion` is set.
        UsageError: no repository can have this name, or `folder` has a file that every reader
            prefers to the chosen weights.
        HubFault: the hub or the repository cannot be accessed, or has no readable weights.
        TensorFault: the index names shards that are invalid or do not exist.
    """
    choose = partial(choose_model, for_conversion=for_conversion)
    listing = list_files(repository, revision, folder, choose)
    weights = _weights(listing.files)
    for other in WEIGHT_FILES[: WEIGHT_FILES.index(weights)] if weights else ():
        if (folder / other).exists():
            raise UsageError(
                f"{folder / other}: already exists, and would be read instead of {weights}, which "
                "is to be downloaded",
                hint="choose another folder with --out, or delete the file",
            )
    return listing


def choose_model(contents: Contents, *, for_conversion: bool = False) -> Iterable[str]:
    """Yield the files of one set of weights, its companions, licenses and model card.

    All names are known ones, except for those of shards, which are checked.

    Args:
        contents: content of the repository.
        for_conversion: whether a model that cannot be converted is refused.

    Raises:
        ConfigError: the model is not a GPT-J, and `for_conversion` is set.
        HubFault: the repository has no readable weights.
        TensorFault: the index names shards that are invalid or do not exist.
    """
    weights = _weights(contents.names)
    if not weights or CONFIG_FILE not in contents.names:
        raise _unreadable(contents)
    _check_config(contents, for_conversion=for_conversion)
    yield weights
    yield CONFIG_FILE
    yield from choose_companions(contents.names)
    yield from choose_documents(contents.names)
    if is_index(weights):
        yield from _shards(contents, weights)


def _check_config(contents: Contents, *, for_conversion: bool) -> None:
    """Refuse or note a model that cannot be converted, before its weights are downloaded."""
    where = f"{contents.repository}: {CONFIG_FILE}"
    try:
        data = contents.read(CONFIG_FILE, MAX_CONFIG_BYTES)
        values = parse_json(data, where=where, max_marks=MAX_CONFIG_MARKS)
        GPTJConfig.from_hf(values, where=where)
    except FileFault as e:
        raise HubFault(e.message, hint=_HINT) from None
    except ConfigError as e:
        if for_conversion:
            raise
        _log.warning("%s; the model is downloaded, but cannot be converted", e.message)


def _weights(names: Collection[str]) -> str | None:
    return next((name for name in WEIGHT_FILES if name in names), None)


def _shards(contents: Contents, index: str) -> tuple[str, ...]:
    """Return the names of the shards in an index, which must be valid and in the repository."""
    where = f"{contents.repository}: {index}"
    try:
        found = parse_index(contents.read(index, MAX_INDEX_BYTES), index, where=where)
    except FileFault as e:
        raise HubFault(e.message, hint=_HINT) from None
    missing = [n for n in found.shards if n not in contents.names]
    problems = [*found.problems, *(f"shard {n} is not in the repository" for n in missing)]
    if problems:
        raise TensorFault(where, problems, hint=_HINT)
    return found.shards


def _unreadable(contents: Contents) -> HubFault:
    if CONFIG_FILE not in contents.names:
        hint = "check the name: every model repository has one"
        return HubFault(f"{contents.repository}: has no {CONFIG_FILE}", hint=hint)
    others = (repr(n) for n in contents.names if n.endswith(_OTHER_WEIGHTS))
    found = ", ".join(others) or "no weights"
    return HubFault(
        f"{contents.repository}: has neither {' nor '.join(WEIGHT_FILES)}; found {found[:300]}",
        hint="name a repository, or with --revision a branch, that has one of them",
    )
