"""A checkpoint of either layout, found and opened: its config, its tensors, its other files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptj_convert import vocabulary
from gptj_convert.adapter_folder import PeftAdapter, refuse_without_base
from gptj_convert.config_file import config_from_file
from gptj_convert.cs_trainer import TRAINER_FILE
from gptj_convert.cs_trainer import config_beside as config_beside_model
from gptj_convert.formats import cs, hf, keras, sharded, tf
from gptj_convert.formats.bundle import BundleSource
from gptj_convert.formats.torch_optimizer import OPTIMIZER_FILE, OptimizerSource
from gptj_convert.joined_source import JoinedSource
from gptj_convert.merged_source import MergedSource
from gptj_convert.reference_yaml import PARAMS_FILE
from gptj_convert.reference_yaml import config_beside as config_beside_bundle
from gptj_model.config import CONFIG_FILE, GPTJConfig
from gptj_model.dtypes import widest
from gptj_model.errors import ConfigError, FileFault
from gptj_model.source import TensorSource
from gptj_model.tensors import Scheme, table


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint. Use it as a context manager, or close its source."""

    path: Path
    """What was asked for."""
    scheme: Scheme
    config: GPTJConfig
    source: TensorSource
    files: tuple[Path, ...]
    """The files that hold its tensors, and their index."""
    vocab_choice: str | None = None
    """Where its vocab_size is from: one of `options.VOCAB_SIZES`; None: both must agree."""
    optimizer: OptimizerSource | None = None
    """A file with an optimizer's state beside the weights, if it was asked for and is there."""
    adapter: PeftAdapter | None = None
    """The adapter that is merged into `source`; see `merged_checkpoint`."""

    @property
    def everything(self) -> TensorSource:
        """Weights and state, by names that are none of both."""
        return JoinedSource(self.source, self.optimizer) if self.optimizer else self.source

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.files[0].parent

    @property
    def dtype(self) -> str:
        """The widest dtype of its weights, which are those of the table; see `plan.match`."""
        names = (t.name(self.scheme) for t in table(self.config))
        return widest(self.source.tensors[name].dtype for name in names)

    def stored_dtype(self, name: str) -> str:
        """Return the dtype of a tensor in the files; one that is merged is read in a wider one."""
        source = self.source.base if isinstance(self.source, MergedSource) else self.source
        return source.tensors[name].dtype

    @property
    def merging_memory(self) -> int:
        """Bytes that reading takes beside a buffer; 0 where nothing is merged."""
        return self.source.memory if isinstance(self.source, MergedSource) else 0

    @property
    def companions(self) -> list[Path]:
        """Tokenizer and generation files beside the weights."""
        names = (*hf.TOKENIZER_FILES, hf.GENERATION_FILE)
        return [self.folder / n for n in names if (self.folder / n).is_file()]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.source.close()
        if self.optimizer:
            self.optimizer.close()


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint is, before anything of it is read."""

    path: Path
    """What was asked for."""
    scheme: Scheme
    weights: Path
    """The weight file, the index of shards or, of a bundle, the prefix."""


def open_checkpoint(
    path: Path,
    *,
    config_file: Path | None = None,
    vocab_choice: str | None = None,
    with_optimizer: bool = False,
) -> Checkpoint:
    """Find and open the GPT-J checkpoint that `path` is or holds.

    Args:
        path: a folder, a weight file, an index of shards, or a bundle's prefix.
        config_file: a file that states the config, to use instead of the one beside the weights.
        vocab_choice: see `Checkpoint`.
        with_optimizer: open an optimizer.pt beside Hugging Face's weights, too.

    Raises:
        ConfigError: no config, or one that is not a GPT-J.
        FileFault: no checkpoint there, or a corrupt one.
        TensorFault: an index and its shards disagree.
    """
    location = locate(path)
    config = read_config(location, config_file)
    source, files = open_source(location)
    config = vocabulary.settle(config, location.scheme, source.tensors, vocab_choice)
    state = location.weights.with_name(OPTIMIZER_FILE)
    if not (with_optimizer and location.scheme is Scheme.HF and state.is_file()):
        return Checkpoint(path, location.scheme, config, source, files, vocab_choice)
    return Checkpoint(
        path, location.scheme, config, source, (*files, state), vocab_choice, OptimizerSource(state)
    )


def locate(path: Path) -> Location:
    """Find the checkpoint that `path` is or holds.

    Raises:
        FileFault: there is none.
    """
    weights = hf.find_weights(path)
    if weights:
        return Location(path, Scheme.HF, weights)
    prefix = tf.find_bundle(path)
    if prefix:
        return Location(path, Scheme.TF, prefix)
    if weights := keras.find_weights(path):
        return Location(path, Scheme.KERAS, weights)
    if weights := cs.find_weights(path):
        return Location(path, Scheme.CS, weights)
    if not path.exists():
        raise FileFault(
            f"{path}: not found, expected a checkpoint",
            hint="`gptj download` fetches GPT-J-6B to ./gpt-j-6b; "
            "`gptj new` makes a random one for trials",
        )
    refuse_without_base(path)
    if path.is_dir():
        if shards := hf.shards_without_index(path):
            raise FileFault(
                f"{path}: holds {shards[0]} and {len(shards) - 1} more, but no index of shards, "
                f"expected {' or '.join(n for n in hf.WEIGHT_FILES if sharded.is_index(n))}",
                hint="fetch the index from where the shards came from",
            )
        wanted = ", ".join(
            (*hf.WEIGHT_FILES, f"{tf.CONVERTED_PREFIX}.index", keras.WEIGHTS_FILE, cs.MODEL_FILE)
        )
        raise FileFault(f"{path}: holds no checkpoint, expected one of {wanted}")
    raise FileFault(
        f"{path}: is not a checkpoint, expected .safetensors, .bin, .index, .h5 or .mdl"
    )


def open_source(location: Location) -> tuple[TensorSource, tuple[Path, ...]]:
    """A checkpoint's tensors, and the files that hold them.

    Raises:
        FileFault: one of them is missing or corrupt.
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
    """The config in `config_file`, else the one beside the weights.

    Raises:
        ConfigError: there is none, or one that is not a GPT-J.
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


#: The YAML file that may describe a checkpoint in place of a config.json, and its reader.
_CONFIG_FROM_YAML = {
    Scheme.TF: (PARAMS_FILE, config_beside_bundle),
    Scheme.CS: (TRAINER_FILE, config_beside_model),
}
