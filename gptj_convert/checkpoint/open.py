"""Checkpoints of any format, found and opened: config, tensors and companion files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_convert.checkpoint import vocabulary_size
from gptj_convert.checkpoint.adapter_folder import PeftAdapter
from gptj_convert.checkpoint.joined_source import JoinedSource
from gptj_convert.checkpoint.merged_source import MergedSource
from gptj_convert.checkpoint.other_files import no_checkpoint
from gptj_convert.checkpoint.source_names import (
    RenamedSource,
    SourceNames,
    matching,
    source_names,
)
from gptj_convert.formats.containers import sharded
from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_convert.formats.layouts import cs, hf, keras, tf
from gptj_convert.formats.layouts.torch_optimizer import OPTIMIZER_FILE, OptimizerSource
from gptj_convert.settings.config_file import config_from_file
from gptj_convert.settings.params_yaml import PARAMS_FILE
from gptj_convert.settings.params_yaml import config_beside as config_beside_bundle
from gptj_convert.settings.trainer_yaml import TRAINER_FILE
from gptj_convert.settings.trainer_yaml import config_beside as config_beside_model
from gptj_model.config import CONFIG_FILE, GPTJConfig
from gptj_model.dtypes import widest
from gptj_model.errors import ConfigError, UsageError
from gptj_model.source import TensorSource
from gptj_model.tensors import Scheme, table

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint. Use it as a context manager, or close its source."""

    path: Path
    """Path that was asked for."""
    scheme: Scheme
    config: GPTJConfig
    source: TensorSource
    files: tuple[Path, ...]
    """Files that hold the tensors, and their index."""
    vocab_choice: str | None = None
    """How its vocab_size was chosen: one of `options.VOCAB_SIZES`; None means that config and
    tensors must agree."""
    dropped: tuple[str, ...] = ()
    """Names in its files of tensors that were dropped on request."""
    optimizer: OptimizerSource | None = None
    """File with optimizer state beside the weights, if it was asked for and exists."""
    config_file: Path | None = None
    """The config.json that describes it; None if a YAML file does."""
    adapter: PeftAdapter | None = None
    """Adapter that is merged into `source`; see `merged_checkpoint`."""

    @property
    def everything(self) -> TensorSource:
        """Weights and optimizer state as one source; their names never collide."""
        return JoinedSource(self.source, self.optimizer) if self.optimizer else self.source

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.files[0].parent

    @property
    def dtype(self) -> str:
        """Widest dtype of its weights, which must be those of the table; see `plan.match`."""
        names = (t.name(self.scheme) for t in table(self.config))
        return widest(self.source.tensors[name].dtype for name in names)

    def stored_dtype(self, name: str) -> str:
        """Return the dtype of a tensor in the files; a merged tensor is read in a wider one."""
        source = self.source.base if isinstance(self.source, MergedSource) else self.source
        return source.tensors[name].dtype

    @property
    def merging_memory(self) -> int:
        """Number of bytes that reading takes beside a buffer; 0 where nothing is merged."""
        return self.source.memory if isinstance(self.source, MergedSource) else 0

    @property
    def companions(self) -> list[str]:
        """Settings files beside the weights that belong to them, by their paths in the folder."""
        return hf.choose_companions(hf.settings_files(self.folder))

    @property
    def documents(self) -> list[str]:
        """Names of the licenses and of the model card beside the weights."""
        return hf.choose_documents(p.name for p in self.folder.iterdir() if p.is_file())

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()
        if self.optimizer:
            self.optimizer.close()


@dataclass(frozen=True, slots=True)
class Location:
    """Location of a checkpoint, before anything of it is read."""

    path: Path
    """Path that was asked for."""
    scheme: Scheme
    weights: Path
    """Weight file, index of shards or, of a bundle, the prefix."""


def open_checkpoint(
    path: Path,
    *,
    config_file: Path | None = None,
    vocab_choice: str | None = None,
    drop: Sequence[str] = (),
    with_optimizer: bool = False,
) -> Checkpoint:
    """Find and open the GPT-J checkpoint that `path` is or holds.

    Where a wrapper has renamed the tensors, they get the names of the table back, and a note in the
    log says so.

    Args:
        path: folder, weight file, index of shards, or prefix of a bundle.
        config_file: file that states the config, instead of the one beside the weights.
        vocab_choice: which vocabulary size counts; see `Checkpoint.vocab_choice`.
        drop: names of tensors to drop, or shell patterns of them.
        with_optimizer: whether to open an optimizer.pt beside Hugging Face's weights, too.

    Raises:
        ConfigError: there is no config, or it describes no GPT-J.
        FileFault: there is no checkpoint, or it is corrupt.
        TensorFault: an index and its shards disagree.
        UsageError: a weight of the model would be dropped.
    """
    location = locate(path)
    scheme = location.scheme
    config = read_config(location, config_file)
    source, files = open_source(location)
    in_file = source_names(source.tensors).in_file if drop else {}
    source, dropped = _renamed(path, source, scheme, drop)
    config = vocabulary_size.settle(config, scheme, source.tensors, vocab_choice)
    weights = {t.name(scheme) for t in table(config)} - source.tensors.keys()
    if lost := [name for name in weights if in_file.get(name) in dropped]:
        source.close()
        raise UsageError(
            f"{path}: {in_file[min(lost)]!r} is a weight of this model, which cannot be dropped",
            hint="drop only tensors that are not part of the model",
        )
    state = location.weights.with_name(OPTIMIZER_FILE)
    optimizer = None
    if with_optimizer and scheme is Scheme.HF and state.is_file():
        optimizer, files = OptimizerSource(state), (*files, state)
    beside = location.weights.with_name(CONFIG_FILE)
    return Checkpoint(
        path,
        scheme,
        config,
        source,
        files,
        vocab_choice,
        dropped,
        optimizer,
        config_file or (beside if beside.is_file() else None),
    )


def open_named(location: Location) -> tuple[TensorSource, tuple[Path, ...]]:
    """Return a checkpoint's tensors under the table's names, and the files that hold them.

    Raises:
        FileFault, TensorFault: see `open_source`.
    """
    source, files = open_source(location)
    return _renamed(location.path, source, location.scheme, ())[0], files


def _renamed(
    path: Path, source: TensorSource, scheme: Scheme, drop: Sequence[str]
) -> tuple[TensorSource, tuple[str, ...]]:
    """Return the source under the table's names without the dropped tensors, and these."""
    dropped = tuple(name for name in source.tensors if matching(drop, name))
    kept = [name for name in source.tensors if name not in dropped]
    names = (
        source_names(kept)
        if scheme is Scheme.HF
        else SourceNames(dict(zip(kept, kept, strict=True)))
    )
    for note in names.notes:
        _log.warning("%s: %s", path, note)
    if names.notes or dropped:
        source = RenamedSource(source, names.in_file)
    return source, dropped


def locate(path: Path) -> Location:
    """Find the checkpoint that `path` is or holds.

    Raises:
        FileFault: there is no checkpoint.
    """
    if weights := hf.find_weights(path):
        return Location(path, Scheme.HF, weights)
    prefix = tf.find_bundle(path)
    if prefix:
        return Location(path, Scheme.TF, prefix)
    if weights := keras.find_weights(path):
        return Location(path, Scheme.KERAS, weights)
    if weights := cs.find_weights(path):
        return Location(path, Scheme.CS, weights)
    if path.is_file() and sharded.kind_of_content(path):
        return Location(path, Scheme.HF, path)
    raise no_checkpoint(path)


def open_source(location: Location) -> tuple[TensorSource, tuple[Path, ...]]:
    """Return a checkpoint's tensors under the names in its files, and the files.

    Raises:
        FileFault: a file is missing or corrupt.
        TensorFault: an index and its shards disagree.
    """
    if location.scheme is Scheme.HF:
        return hf.open_weights(location.weights)
    if location.scheme is Scheme.KERAS:
        return keras.KerasSource(location.weights), (location.weights,)
    if location.scheme is Scheme.CS:
        return cs.CsSource(location.weights), (location.weights,)
    bundle = BundleSource(location.weights)
    return bundle, tuple(bundle.files)


def read_config(location: Location, config_file: Path | None) -> GPTJConfig:
    """Return the config in `config_file`, else the one beside the weights.

    Raises:
        ConfigError: there is no config, or it describes no GPT-J.
    """
    beside = location.weights.parent / CONFIG_FILE
    yaml = _CONFIG_FROM_YAML.get(location.scheme)
    if config_file or yaml is None or beside.is_file():
        return config_from_file(config_file) if config_file else GPTJConfig.from_file(beside)
    name, config_beside = yaml
    config = config_beside(location.weights)
    if config is None:
        raise ConfigError(
            f"{location.weights}: no {CONFIG_FILE} or {name} beside it, and such a checkpoint "
            "does not hold the number of heads, rotary_dim or epsilon",
            hint="name the model's configuration with `--config FILE`",
        )
    return config


#: YAML files that may describe a checkpoint instead of a config.json, with their readers.
_CONFIG_FROM_YAML = {
    Scheme.TF: (PARAMS_FILE, config_beside_bundle),
    Scheme.CS: (TRAINER_FILE, config_beside_model),
}
