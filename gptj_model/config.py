"""The shape of a GPT-J and the constants of its computation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gptj_model.errors import ConfigError

MODEL_TYPE = "gptj"
ARCHITECTURE = "GPTJForCausalLM"
CONFIG_FILE = "config.json"

#: GPT-2's `<|endoftext|>`, its last token; 143 extra ones follow in GPT-J's vocabulary.
END_OF_TEXT_ID = 50256
VOCAB_SIZE = 50400

#: Names that Hugging Face gives to GELU in its tanh form.
TANH_GELU_NAMES = ("gelu_new", "gelu_pytorch_tanh")

#: Largest values of any published or plausible GPT-J. A config beyond them is a typing error or
#: hostile, and nothing is allocated for it.
_LIMITS = {
    "vocab_size": 10_000_000,
    "n_positions": 1_000_000,
    "n_embd": 1_000_000,
    "n_layer": 10_000,
    "n_head": 10_000,
    "n_inner": 10_000_000,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTJConfig:
    """Shapes and constants of one GPT-J, frozen.

    Field names are those of the Hugging Face config.json. The defaults are GPT-J-6B.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or is not implemented; all such
            values are named at once.
    """

    vocab_size: int = VOCAB_SIZE
    """Rows of the embedding and of the head: 50257 GPT-2 tokens and 143 extra ones."""

    n_positions: int = 2048
    """Longest sequence, in tokens."""

    n_embd: int = 4096
    """Width of the hidden states."""

    n_layer: int = 28
    """Number of blocks."""

    n_head: int = 16
    """Number of attention heads; each has n_embd / n_head features."""

    n_inner: int | None = None
    """Width of the feed-forward layer; None means 4 · n_embd."""

    rotary_dim: int = 64
    """Number of leading features of each head that the rotary embedding rotates; even."""

    layer_norm_epsilon: float = 1e-5
    """Constant added to the variance in every layer norm."""

    activation_function: str = "gelu_new"
    """Activation of the feed-forward layer: GELU in its tanh form, one of `TANH_GELU_NAMES`."""

    attn_pdrop: float = 0.0
    """Dropout rate of the attention probabilities, in training."""

    embd_pdrop: float = 0.0
    """Dropout rate of the embeddings, in training."""

    resid_pdrop: float = 0.0
    """Dropout rate of the outputs of attention and feed-forward, in training."""

    tie_word_embeddings: bool = False
    """Whether the head uses the embedding as its weight."""

    bos_token_id: int | None = END_OF_TEXT_ID
    """Token that starts a text."""

    eos_token_id: int | tuple[int, ...] | None = END_OF_TEXT_ID
    """Token that ends a text, or several tokens that each end one; None means that no token
    does."""

    carried: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    """Fields of a config.json that this program does not read, carried for the programs that do."""

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Number of features per head."""
        return self.n_embd // self.n_head

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward layer, with the default resolved."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by the letters that the table of tensors uses for them."""
        return {"V": self.vocab_size, "D": self.n_embd, "F": self.ffn_dim}

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTJConfig:
        """Return one of `PRESETS`, with single fields replaced.

        Raises:
            ConfigError: the preset or a field does not exist, or a value is impossible.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown, expected one of {', '.join(PRESETS)}")
        known = set(_OWN_FIELDS)
        for key in overrides:
            if key not in known:
                raise ConfigError(
                    f"config field {key!r} is unknown, expected one of {', '.join(sorted(known))}"
                )
        values: dict[str, Any] = PRESETS[name] | overrides
        vocab_size = values.get("vocab_size", VOCAB_SIZE)
        if type(vocab_size) is int and vocab_size <= END_OF_TEXT_ID:
            last: dict[str, Any] = {"bos_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1}
            values = last | values
        return cls(**values)

    @classmethod
    def from_hf(cls, values: Any, *, where: str = CONFIG_FILE) -> GPTJConfig:
        """Read the content of a Hugging Face config.json.

        Args:
            values: the parsed JSON object.
            where: the file's name, for error messages.

        Raises:
            ConfigError: the object does not describe a GPT-J, or asks for what is not implemented.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: holds {type(values).__name__}, expected a JSON object")
        found = values.get("model_type")
        if found != MODEL_TYPE:
            raise ConfigError(
                f"{where}: model_type is {found!r}, expected {MODEL_TYPE!r}",
                hint="use a GPT-J checkpoint; other GPT models compute differently",
            )
        values = _without_aliases(values, where)
        needed = ("vocab_size", "n_embd", "n_layer", "n_head", "rotary_dim")
        missing = [name for name in needed if name not in values]
        if missing:
            raise ConfigError(f"{where}: {', '.join(missing)} missing, expected a number for each")
        if values.get("scale_attn_weights", True) is not True:
            raise ConfigError(f"{where}: scale_attn_weights is off, which GPT-J does not implement")
        try:
            return cls(
                **{k: _as_tuple(v) for k, v in values.items() if k in _OWN_FIELDS},
                carried={k: v for k, v in values.items() if k not in _WRITTEN_FIELDS},
            )
        except ConfigError as e:
            raise ConfigError(f"{where}: {e.message}", hint=e.hint) from None

    @classmethod
    def from_file(cls, path: Path) -> GPTJConfig:
        """Read a config.json.

        Raises:
            ConfigError: the file does not exist or is not JSON; see also `from_hf`.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: not found, expected the model's configuration",
                hint="copy config.json from where the weights came from",
            ) from None
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: cannot be read: {e}") from None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{path}: is not valid JSON: {e}") from None
        return cls.from_hf(values, where=str(path))

    def to_hf(self, *, dtype: str) -> dict[str, Any]:
        """Return the content of a Hugging Face config.json that transformers loads.

        Args:
            dtype: canonical name of the dtype that the weights are stored in.
        """
        return {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            **self.own_fields(),
            "dtype": dtype,
            "use_cache": True,
            "initializer_range": 0.02,
            **{k: v for k, v in self.carried.items() if k not in NOT_CARRIED},
        }

    def own_fields(self) -> dict[str, Any]:
        """Return every field except `carried`, as JSON has them."""
        values = {name: getattr(self, name) for name in _OWN_FIELDS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that each end a text."""
        return as_tokens(self.eos_token_id)


#: Fields that this program reads, in the order in which they are written.
_OWN_FIELDS = tuple(f.name for f in fields(GPTJConfig) if f.name != "carried")

#: Fields of a config.json that are written from what is known here and never carried.
_WRITTEN_FIELDS = frozenset({*_OWN_FIELDS, "model_type", "architectures", "dtype", "torch_dtype"})

#: Fields of a config.json that are not carried, with the reason: what they refer to is not beside
#: the new weights.
NOT_CARRIED = {
    "auto_map": "it names program code, which is never run",
    "quantization_config": "the weights are written unquantized",
}

#: Aliases of fields in transformers, which prefers the alias where a file has both.
_ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def as_tokens(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return the ids of a field that holds one id, several or none."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def default_ends(vocab_size: Any) -> dict[str, Any]:
    """Return start and end of a text where nothing states them: GPT-2's end-of-text, if it
    exists."""
    end = END_OF_TEXT_ID if type(vocab_size) is int and vocab_size > END_OF_TEXT_ID else None
    return {"bos_token_id": end, "eos_token_id": end}


def _without_aliases(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields under their own names.

    Raises:
        ConfigError: a field has two names and two values.
    """
    found = {k: v for k, v in values.items() if k not in _ALIASES}
    for alias, name in _ALIASES.items():
        if alias in values and found.setdefault(name, values[alias]) != values[alias]:
            raise ConfigError(
                f"{where}: {name} is {found[name]!r}, but its alias {alias} is "
                f"{values[alias]!r}, expected the same value"
            )
    return found


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


#: Fields that do not change what is computed from the weights.
NOT_COMPUTED = frozenset(
    {"attn_pdrop", "embd_pdrop", "resid_pdrop", "bos_token_id", "eos_token_id"}
)


def differing_fields(a: GPTJConfig, b: GPTJConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two configs differ, with both values; `ffn_dim` stands for
    `n_inner`."""
    names = [*(name for name in _OWN_FIELDS if name != "n_inner"), "ffn_dim"]
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8},
    "125m": {"n_embd": 768, "n_layer": 12, "n_head": 12, "rotary_dim": 32},
    "6b": {},
}


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _problems(config: GPTJConfig) -> list[str]:
    problems = []
    for name, limit in _LIMITS.items():
        value = getattr(config, name)
        if name == "n_inner" and value is None:
            continue
        if type(value) is not int or not 1 <= value <= limit:
            problems.append(f"{name} is {value!r}, expected a whole number from 1 to {limit}")
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            problems.append(f"{name} is {value!r}, expected a number from 0 to less than 1")
    epsilon = config.layer_norm_epsilon
    if type(epsilon) not in (int, float) or not math.isfinite(epsilon) or not 0 < epsilon < 1:
        problems.append(f"layer_norm_epsilon is {epsilon!r}, expected a number between 0 and 1")
    if config.activation_function not in TANH_GELU_NAMES:
        problems.append(
            f"activation_function is {config.activation_function!r}, "
            f"expected one of {', '.join(TANH_GELU_NAMES)}"
        )
    if type(config.tie_word_embeddings) is not bool:
        problems.append(
            f"tie_word_embeddings is {config.tie_word_embeddings!r}, expected true or false"
        )
    if config.bos_token_id is not None and type(config.bos_token_id) is not int:
        problems.append(f"bos_token_id is {config.bos_token_id!r}, expected a token id or null")
    ends = config.eos_token_id
    if ends is not None and any(type(i) is not int for i in _several(ends)):
        problems.append(f"eos_token_id is {ends!r}, expected a token id, a list of them or null")
    if problems:
        return problems
    if config.n_embd % config.n_head:
        problems.append(
            f"n_embd is {config.n_embd}, expected a multiple of n_head ({config.n_head})"
        )
    elif (
        type(config.rotary_dim) is not int
        or config.rotary_dim % 2
        or not 2 <= config.rotary_dim <= config.head_dim
    ):
        problems.append(
            f"rotary_dim is {config.rotary_dim!r}, "
            f"expected an even number from 2 to the head's {config.head_dim} features"
        )
    return problems
