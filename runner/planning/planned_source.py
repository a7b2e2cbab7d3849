"""Checkpoints that a plan starts from: existing ones, and those that a command will provide."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gptj_convert.checkpoint.open import Checkpoint, locate, open_checkpoint
from gptj_convert.formats.containers.sharded import is_index
from gptj_convert.options import DEFAULT_SOURCE
from gptj_model.config import CONFIG_FILE, PRESETS, GPTJConfig
from gptj_model.dtypes import FLOATS
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo
from gptj_model.tensors import Scheme, table

#: Preset that is on the hub; its weights there are float32, and float16 in a branch.
PUBLISHED = "6b"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that exists, or can be fetched."""

    checkpoint: Checkpoint
    fetch: str | None
    """Command that fetches it; None if it exists."""


class _Headers:
    """A checkpoint that does not exist yet, by the headers that it will have."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise FileFault(f"{name}: is only planned")

    def close(self) -> None:
        pass


def find_sources(what: str) -> list[Source]:
    """Return the checkpoints that can be converted, the best first.

    Args:
        what: one of `PRESETS`, a config.json, a folder with one, or a checkpoint.

    Raises:
        ConfigError, FileFault, TensorFault: the argument is none of these.
    """
    path = Path(what)
    if what in PRESETS:
        config = GPTJConfig.preset(what)
        folder = DEFAULT_SOURCE if what == PUBLISHED else Path(f"gpt-j-{what}")
        fetch = f"gptj new --preset {what} --out {folder}", " --dtype float16"
        if what == PUBLISHED:
            fetch = "gptj download", " --revision float16"
        return [
            Source(_planned(folder, config, "float32"), fetch[0]),
            Source(_planned(folder, config, "float16"), "".join(fetch)),
        ]
    config_file = path / CONFIG_FILE if path.is_dir() else path
    if (path.suffix == ".json" and not is_index(path.name)) or _holds_only_a_config(path):
        config = GPTJConfig.from_file(config_file)
        values = json.loads(config_file.read_text(encoding="utf-8"))
        stated = values.get("dtype", values.get("torch_dtype"))
        dtype = stated if stated in FLOATS else "float32"
        return [Source(_planned(config_file.parent, config, dtype), "gptj download OWNER/NAME")]
    return [Source(open_checkpoint(path), None)]


def _holds_only_a_config(folder: Path) -> bool:
    if not (folder / CONFIG_FILE).is_file():
        return False
    try:
        locate(folder)
    except FileFault:
        return True
    return False


def _planned(path: Path, config: GPTJConfig, dtype: str) -> Checkpoint:
    headers = {t.hf: TensorInfo(dtype, t.shape) for t in table(config)}
    return Checkpoint(path, Scheme.HF, config, _Headers(headers), ())
