"""An adapter of the peft library on disk: its settings and tensors, found and checked.

Features of peft that this program lacks are refused by name. Which layers are adapted is decided as
peft decides it, so that merging gives what `merge_and_unload` gives.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptj_convert.files.digest import digest
from gptj_convert.formats.layouts import hf
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import FLOATS
from gptj_model.errors import ConfigError, FileFault, TensorFault
from gptj_model.lora import PEFT_PREFIX, Lora, adapter_rows, target_of
from gptj_model.source import TensorInfo, TensorSource
from gptj_model.tensors import DENSE_LAYERS, EMBEDDING, HEAD_WEIGHT, Tensor, table

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILES = ("adapter_model.safetensors", "adapter_model.bin")

#: Fields that must have one of these values for the merge to be W + scale · B · A.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other values change the base when peft loads the adapter.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
#: Fields that are read below, and fields that do not affect the merge.
_READ = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "base_model_name_or_path",
)
_HARMLESS = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "runtime_config",
)
#: What peft reads as every dense layer except the head.
_ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSettings:
    """Content of an adapter_config.json, as far as it affects a merge."""

    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    """Names of modules or their endings, a pattern of whole names, or "all-linear"."""
    excluded: str | tuple[str, ...]
    """Names, endings or a pattern of modules that are excluded."""
    ranks: Mapping[str, int]
    """Ranks of single modules, by pattern of the module's name."""
    alphas: Mapping[str, float]
    """Alphas of single modules, by pattern of the module's name."""
    stabilized: bool
    """Whether the update is multiplied by alpha / √rank instead of alpha / rank."""
    layers: tuple[int, ...]
    """Numbers of the adapted blocks; empty means all."""
    layers_pattern: tuple[str, ...]
    """Names that precede a block's number; empty means any."""
    saved: tuple[str, ...]
    """Names or endings of modules that are replaced as a whole."""
    base: str | None
    """Base model: a folder, or a repository on the hub."""

    def adapts(self, module: str) -> bool:
        """Return whether a module gets an adapter, by its name in the model."""
        if _is_named(self.excluded, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.saved):
            return False
        if self.targets == _ALL_LINEAR:
            return module.rpartition(".")[2] in DENSE_LAYERS
        if not _is_named(self.targets, module):
            return False
        if isinstance(self.targets, str) or module in self.targets or not self.layers:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern]
        found = (re.match(pattern, module) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."])
        number = next((match[1] for match in found if match), None)
        return number is not None and int(number) in self.layers

    def replaces(self, module: str) -> bool:
        """Return whether a module is replaced as a whole."""
        return any(module.endswith(name) for name in self.saved)

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return self.ranks.get(_pattern_of(self.ranks, module), self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the alpha of a module's adapter."""
        return self.alphas.get(_pattern_of(self.alphas, module), self.alpha)

    def scale_of(self, module: str) -> float:
        """Return the factor of a module's B · A."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.stabilized else rank)


_HEAD = HEAD_WEIGHT.hf.removesuffix(".weight")


def _is_named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern_of(patterns: Mapping[str, Any], module: str) -> str:
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """Update of a kernel: scale · B · A."""

    a: str
    """Name of A (rank × inputs) in the adapter's file."""
    b: str
    """Name of B (outputs × rank) in the adapter's file."""
    rank: int
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftAdapter:
    """An open adapter whose tensors are those that its settings and the model call for."""

    folder: Path
    settings: AdapterSettings
    source: TensorSource
    files: tuple[Path, ...]
    updates: Mapping[Tensor, Update]
    """Updates by the row of their kernel."""
    replaced: Mapping[Tensor, str]
    """Tensors of the adapter that replace a row of the table, by that row."""

    def describe(self) -> dict[str, Any]:
        """Return the adapter as a manifest records it."""
        settings = self.settings
        targets = dict.fromkeys(target_of(t) or _HEAD for t in self.updates)
        return {
            "path": str(self.folder.absolute()),
            "base": settings.base,
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "targets": list(targets),
            "replaced": [t.hf for t in self.replaced],
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": digest(path)}
                for path in self.files
            },
        }

    def lora(self, config: GPTJConfig) -> Lora:
        """Return the adapter as training describes it, with one rank and one scale.

        Raises:
            ConfigError: the adapter has several ranks or scales, or replaces modules.
        """
        found = {target_of(t) for t in self.updates}
        rows = [t for t in table(config) if target_of(t) in found]
        kinds = {(u.rank, u.scale) for u in self.updates.values()}
        problems: list[str] = []
        if len(kinds) > 1:
            problems.append(f"has {len(kinds)} pairs of rank and scale, expected one")
        if self.replaced:
            problems.append(f"replaces {', '.join(t.hf for t in self.replaced)}")
        if None in found:
            problems.append(f"adapts {_HEAD}")
        if None not in found and len(rows) != len(self.updates):
            problems.append("adapts only some blocks")
        if problems:
            raise ConfigError(
                f"{self.folder}: {'; '.join(problems)}, expected one rank and "
                "scale for dense layers of every block to continue training"
            )
        ((rank, scale),) = kinds
        targets = dict.fromkeys(name for name in map(target_of, rows) if name)
        return Lora(rank=rank, alpha=scale * rank, targets=tuple(targets))

    def close(self) -> None:
        """Close the files."""
        self.source.close()


def is_adapter(path: Path) -> bool:
    """Return whether a folder holds an adapter."""
    return (path / CONFIG_FILE).is_file()


def stated_base(path: Path) -> str | None:
    """Return the base model that an adapter's folder names; None if it names none."""
    try:
        base = _json(path).get("base_model_name_or_path")
    except (ConfigError, FileFault):
        return None
    return base if isinstance(base, str) and base and base.isprintable() else None


def open_adapter(folder: Path, config: GPTJConfig) -> PeftAdapter:
    """Open the adapter in a folder.

    Args:
        folder: folder with adapter_config.json and the weights.
        config: configuration of the base model.

    Raises:
        FileFault: a file is missing or corrupt.
        ConfigError: a setting is not implemented, or names what GPT-J lacks; all such settings are
            named.
        TensorFault: the tensors are not those that the settings call for; all such tensors are
            named.
    """
    if not folder.exists():
        raise FileFault(f"{folder}: not found, expected a folder with {CONFIG_FILE}")
    if not is_adapter(folder):
        raise FileFault(
            f"{folder}: holds no {CONFIG_FILE}, expected a folder that peft's save_pretrained wrote"
        )
    weights = next((folder / n for n in WEIGHTS_FILES if (folder / n).is_file()), None)
    if weights is None:
        raise FileFault(f"{folder}: holds no weights, expected {' or '.join(WEIGHTS_FILES)}")
    settings = _settings(folder, config)
    source, files = hf.open_weights(weights)
    try:
        updates = {
            kernel: Update(
                a=rows[0].hf,
                b=rows[1].hf,
                rank=settings.rank_of(_module(kernel)),
                scale=settings.scale_of(_module(kernel)),
            )
            for kernel, rows in _adapted(settings, config).items()
        }
        replaced, problems = _match(source.tensors, settings, config)
        if problems:
            raise TensorFault(str(weights), problems)
    except BaseException:
        source.close()
        raise
    return PeftAdapter(
        folder=folder,
        settings=settings,
        source=source,
        files=(folder / CONFIG_FILE, *files),
        updates=updates,
        replaced=replaced,
    )


def _module(tensor: Tensor) -> str:
    return tensor.hf.rpartition(".")[0]


def _kernels(config: GPTJConfig) -> list[Tensor]:
    """Return the kernels of dense layers, with the head's unless it is tied."""
    return [t for t in table(config) if target_of(t) or t.hf == HEAD_WEIGHT.hf]


def _adapted(settings: AdapterSettings, config: GPTJConfig) -> dict[Tensor, tuple[Tensor, Tensor]]:
    """Return the rows of A and B by the row of their kernel."""
    kernels = (t for t in _kernels(config) if settings.adapts(_module(t)))
    return {t: adapter_rows(t, settings.rank_of(_module(t))) for t in kernels}


def _match(
    tensors: Mapping[str, TensorInfo], settings: AdapterSettings, config: GPTJConfig
) -> tuple[dict[Tensor, str], list[str]]:
    """Return what replaces rows of the table, and what is wrong with the tensors."""
    adapted = _adapted(settings, config)
    expected = {row.hf: row.shape for pair in adapted.values() for row in pair}
    optional: dict[str, Tensor] = {}
    for row in table(config):
        module, _, part = row.hf.rpartition(".")
        # peft saves the own weight of an adapted layer, if at all, under another name.
        layer = f"{module}.base_layer" if settings.adapts(module) else module
        name = f"{PEFT_PREFIX}{layer}.{part}"
        optional[name] = row
        if settings.replaces(module):
            expected[name] = row.shape
    replaced = {row: name for name, row in optional.items() if name in tensors}
    wanted = {name: row.shape for row, name in replaced.items()} | expected
    problems: list[str] = []
    for name, shape in wanted.items():
        info = tensors.get(name)
        if info is None:
            problems.append(f"{name!r} is missing, expected shape {list(shape)}")
        elif info.shape != shape:
            problems.append(f"{name!r} has shape {list(info.shape)}, expected {list(shape)}")
        elif info.dtype not in FLOATS:
            problems.append(f"{name!r} holds {info.dtype}, expected one of {', '.join(FLOATS)}")
    problems += [
        f"{name!r} belongs to no layer that the settings adapt in this model"
        for name in tensors
        if name not in wanted
    ]
    return replaced, problems


def _json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, expected a JSON object")
    return values


def _settings(folder: Path, config: GPTJConfig) -> AdapterSettings:
    values = _json(folder)
    problems = list(_field_problems(values))
    if not problems:
        alphas = values.get("alpha_pattern") or {}
        settings = AdapterSettings(
            rank=values["r"],
            alpha=values["lora_alpha"],
            targets=_names(values["target_modules"]),
            excluded=_names(values.get("exclude_modules") or ()),
            ranks=values.get("rank_pattern") or {},
            alphas=alphas,
            stabilized=values.get("use_rslora") or False,
            layers=_listed(values.get("layers_to_transform")),
            layers_pattern=_listed(values.get("layers_pattern") or None),
            saved=_listed(values.get("modules_to_save")),
            base=values.get("base_model_name_or_path"),
        )
        problems = list(_layer_problems(settings, config))
        if not problems:
            return settings
    raise ConfigError("\n  ".join([f"{folder / CONFIG_FILE}:", *problems]))


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _listed(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _field_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Return the fields that have a wrong type, or ask for what is not implemented."""
    for key, only in _IMPLEMENTED.items():
        value = values.get(key, only[0])
        if not any(value is one or (value == one and type(value) is type(one)) for one in only):
            expected = " or ".join(repr(one) for one in only if one is not None)
            yield f"{key} is {value!r}, which is not implemented, expected {expected}"
    known = {*_IMPLEMENTED, *_READ, *_HARMLESS}
    for key, value in values.items():
        if key not in known and value:
            yield f"{key} is {str(value)[:80]!r}, which is not implemented"
    checks = {
        "r": (_is_rank, "a whole number from 1"),
        "lora_alpha": (_is_number, "a number"),
        "target_modules": (_is_choice, "names of layers, or a pattern"),
        "exclude_modules": (_is_choice, "names of layers, or a pattern"),
        "rank_pattern": (lambda v: _is_patterns(v, _is_rank), "ranks by pattern"),
        "alpha_pattern": (lambda v: _is_patterns(v, _is_number), "numbers by pattern"),
        "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
        "layers_to_transform": (_is_layers, "numbers of blocks"),
        "layers_pattern": (_is_choice, "a name, or names"),
        "modules_to_save": (_is_list_of_patterns, "names of modules"),
        "base_model_name_or_path": (lambda v: isinstance(v, str), "a name or a path"),
    }
    for key, (holds, expected) in checks.items():
        value = values.get(key)
        needed = key in ("r", "lora_alpha", "target_modules")
        if (value is not None or needed) and not holds(value):
            yield f"{key} is {str(value)[:80]!r}, expected {expected}"


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_list_of_patterns(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_pattern, value))


def _is_choice(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return _is_pattern(value)


def _is_patterns(value: Any, holds: Any) -> bool:
    return isinstance(value, dict) and all(_is_pattern(k) and holds(v) for k, v in value.items())


def _is_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(type(n) is int for n in numbers)


def _layer_problems(settings: AdapterSettings, config: GPTJConfig) -> Iterator[str]:
    """Return what the settings name that GPT-J lacks, or that cannot be merged there."""
    kernels = {_module(t) for t in _kernels(config)}
    modules = dict.fromkeys(_module(t) for t in table(config))
    adapted = [name for name in modules if settings.adapts(name)]
    others = [name for name in adapted if name not in {*kernels, _HEAD}]
    if others:
        yield (f"target_modules names {', '.join(others[:3])}, expected only dense layers")
    if not any(name in kernels for name in adapted):
        yield f"target_modules is {settings.targets!r}, but no dense layer of GPT-J has such a name"
    for name in settings.saved:
        if not any(module.endswith(name) for module in modules):
            yield f"modules_to_save names {name!r}, which GPT-J does not have"
    if config.tie_word_embeddings:
        shared = [n for n in (_HEAD, EMBEDDING.hf.removesuffix(".weight")) if settings.replaces(n)]
        if settings.adapts(_HEAD):
            shared.append(_HEAD)
        for name in dict.fromkeys(shared):
            yield f"{name} is changed, but this model ties it to another tensor"
