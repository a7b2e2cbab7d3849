"""The reference's params.yaml: its `model` section read as a GPTJConfig, and written from one.

Key names and defaults are those of the reference implementation's YAML files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter

from gptj_model.config import GPTJConfig, default_ends
from gptj_model.errors import ConfigError

PARAMS_FILE = "params.yaml"
MAX_YAML_BYTES = 2**20
#: Largest number of aliases, which let a small file describe a huge one; no params.yaml needs many.
MAX_ALIASES = 20
_ALIAS = re.compile(rb"(?:^|[\s\[{,:-])\*\w")

#: YAML key → GPTJConfig field, for values that are stored unchanged.
MODEL_KEYS = {
    "hidden_size": "n_embd",
    "num_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "filter_size": "n_inner",
    "rotary_dim": "rotary_dim",
    "max_position_embeddings": "n_positions",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "share_embedding_weights": "tie_word_embeddings",
    "embedding_dropout_rate": "embd_pdrop",
    "attention_dropout_rate": "attn_pdrop",
    "residual_dropout_rate": "resid_pdrop",
}

#: Fields of training, for which YAML takes precedence over config.json.
TRAINING_FIELDS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")

#: The reference's name of the tanh-form GELU.
NONLINEARITY = "gelu"

#: Keys whose only valid value is GPT-J's.
FIXED_MODEL_KEYS: dict[str, Any] = {
    "use_projection_bias_in_attention": False,
    "use_ffn_bias_in_attention": False,
    "use_ffn_bias": True,
    "use_bias_in_output": True,
    "use_untied_layer_norm": False,
    "use_position_embeddings": False,
    "nonlinearity": NONLINEARITY,
}

#: Keys of `model` that the reference reads without a default and that do not describe the model.
READ_WITHOUT_DEFAULT: dict[str, Any] = {
    "mixed_precision": False,
    "boundary_casting": False,
    "tf_summary": False,
}

#: Defaults of adam's and adamw's epsilon, in 32 bits and with mixed_precision.
EPSILON, MIXED_EPSILON = 1e-8, 1e-5

#: The reference's defaults for keys that its files leave out.
MODEL_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 1,
    "layer_norm_epsilon": 1e-8,
    "share_embedding_weights": True,
    "embedding_dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
    "residual_dropout_rate": 0.0,
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a YAML 1.2 file (`1e-4` is a number), which must be a mapping.

    Raises:
        ConfigError: the file does not exist, is too large, is not YAML, has a duplicate key, or is
            not a mapping; names the line.
    """
    try:
        with path.open("rb") as f:
            raw = f.read(MAX_YAML_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: not found, expected a YAML file of parameters") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
    if len(raw) > MAX_YAML_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_YAML_BYTES} bytes, expected parameters")
    if len(_ALIAS.findall(raw)) > MAX_ALIASES:
        raise ConfigError(f"{path}: has more than {MAX_ALIASES} aliases")
    try:
        values = YAML(typ="safe", pure=True).load(raw.decode("utf-8"))
    except MarkedYAMLError as e:
        line = f" at line {e.problem_mark.line + 1}" if e.problem_mark else ""
        problem = str(e.problem).splitlines()[0]
        raise ConfigError(f"{path}: is not valid YAML: {problem}{line}") from None
    except (YAMLError, ValueError, TypeError, RecursionError) as e:
        problem = str(e).splitlines()[0]
        raise ConfigError(f"{path}: is not valid YAML: {problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, expected a mapping of sections")
    return values


def line_finder(path: Path) -> Callable[[Sequence[Any]], int | None]:
    """Return a function that finds the line of a path in a YAML file that `read_yaml` accepts, or
    the line of the longest part of the path that exists."""

    def find(location: Sequence[Any]) -> int | None:
        node = YAML(typ="safe", pure=True).compose(path.read_text(encoding="utf-8"))
        line = None
        for part in location:
            if isinstance(node, MappingNode):
                pairs = {key.value: (key, value) for key, value in node.value}
                if part not in pairs:
                    break
                key, node = pairs[part]
                line = key.start_mark.line + 1
            elif isinstance(node, SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    break
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line

    return find


class _Representer(RoundTripRepresenter):
    """Scalars that readers of YAML 1.1, such as PyYAML, and of YAML 1.2 understand equally."""

    def represent_number(self, data: float) -> ScalarNode:
        """Return a float with a point, because YAML 1.1 reads `5e-05` as text."""
        text = _NOT_FINITE.get(str(data), repr(data))
        if "." not in text:
            text = text.replace("e", ".0e")
        return self.represent_scalar("tag:yaml.org,2002:float", text)

    def represent_text(self, data: str) -> ScalarNode:
        """Return a string, quoted unless it is a word that both versions read as text."""
        plain = _PLAIN.fullmatch(data) and data.lower() not in _NOT_TEXT
        quotes = None if plain else "'" if data.isascii() and data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=quotes)


_NOT_FINITE = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}
#: Strings that start unlike any number, date or other type, and need no quotes for their syntax.
_PLAIN = re.compile(r"[A-Za-z_/][\w./@+-]*", re.ASCII)
#: Words that YAML 1.1 reads as a truth value or as null.
_NOT_TEXT = frozenset(("y", "yes", "n", "no", "on", "off", "true", "false", "null"))

_Representer.add_representer(float, _Representer.represent_number)
_Representer.add_representer(str, _Representer.represent_text)


def yaml_text(values: Mapping[str, Any]) -> str:
    """Return a mapping as YAML that readers of versions 1.1 and 1.2 understand equally."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    yaml.dump(dict(values), stream)
    return stream.getvalue()


def complete_for_reference(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with every section and key that the reference reads without a default."""
    model = READ_WITHOUT_DEFAULT | FIXED_MODEL_KEYS | values["model"]
    if model.get("filter_size") is None:
        model["filter_size"] = 4 * model["hidden_size"]
    run = values.get("runconfig") or {}
    return {"eval_input": {}, **values, "model": model, "runconfig": run}


def config_from_model_section(
    section: Mapping[str, Any], *, vocab_size: int | None, where: str
) -> GPTJConfig:
    """Return the GPTJConfig that a `model` section describes.

    Args:
        section: parsed section; unknown keys are ignored.
        vocab_size: vocabulary size from the input section, where the reference keeps it.
        where: name of the file, for errors.

    Raises:
        ConfigError: a key is missing, or asks for what GPT-J does not have.
    """
    values = MODEL_DEFAULTS | dict(section)
    for key, only in FIXED_MODEL_KEYS.items():
        if values.get(key, only) != only:
            raise ConfigError(f"{where}: model.{key} is {values[key]!r}, expected {only!r}")
    needed = ("hidden_size", "num_heads", "max_position_embeddings", "rotary_dim")
    missing = [f"model.{key}" for key in needed if values.get(key) is None]
    if vocab_size is None:
        missing.append("train_input.vocab_size")
    if missing:
        raise ConfigError(f"{where}: {', '.join(missing)} missing, expected a number for each")
    known: dict[str, Any] = {field: values.get(key) for key, field in MODEL_KEYS.items()}
    known |= {"vocab_size": vocab_size} | default_ends(vocab_size)
    try:
        return GPTJConfig(**known)
    except ConfigError as e:
        raise ConfigError(f"{where}: {_in_yaml_words(e.message)}") from None


def _in_yaml_words(message: str) -> str:
    for key, field in MODEL_KEYS.items():
        message = message.replace(field, f"model.{key}")
    return message


def model_section(config: GPTJConfig) -> dict[str, Any]:
    """Return the `model` section that describes a config."""
    values: dict[str, Any] = {key: getattr(config, field) for key, field in MODEL_KEYS.items()}
    return values | FIXED_MODEL_KEYS | {"filter_size": config.ffn_dim}


def config_beside(checkpoint: Path) -> GPTJConfig | None:
    """Return the config that a params.yaml in the checkpoint's folder, or one folder up,
    describes."""
    path = params_beside(checkpoint)
    if path is None:
        return None
    return config_from_params(read_yaml(path), where=str(path))


def config_from_params(values: Mapping[str, Any], *, where: str) -> GPTJConfig:
    """Return the config that the content of a params.yaml describes.

    Args:
        values: parsed file.
        where: name of the file, for errors.

    Raises:
        ConfigError: there is no section `model`; see also `config_from_model_section`.
    """
    section = values.get("model")
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: has no section `model`")
    vocab = next(
        (
            values[s]["vocab_size"]
            for s in ("train_input", "eval_input")
            if isinstance(values.get(s), dict) and "vocab_size" in values[s]
        ),
        None,
    )
    return config_from_model_section(section, vocab_size=vocab, where=where)


def params_beside(checkpoint: Path) -> Path | None:
    """Return the path of a params.yaml in the checkpoint's folder, or one folder up."""
    folders = (checkpoint.parent, checkpoint.parent.parent)
    return next((f / PARAMS_FILE for f in folders if (f / PARAMS_FILE).is_file()), None)
