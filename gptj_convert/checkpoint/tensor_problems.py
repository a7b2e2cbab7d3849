"""What is wrong with a checkpoint's tensors as a whole, and how to fix it: two tables of
conditions.

A quantized file, or one with an adapter that is not merged, lacks most names: that is one fact, not
a hundred problems. Other explanations are hints, given only where their condition holds for the
file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gptj_convert.checkpoint.match import Finding, Role
from gptj_convert.checkpoint.source_names import model_prefixes
from gptj_model.config import GPTJConfig
from gptj_model.source import TensorInfo
from gptj_model.tensors import HEAD_WEIGHT, Scheme, head, table


@dataclass(frozen=True, slots=True)
class Whole:
    """A property of the whole file."""

    what: str
    name: str
    """Regular expression that matches a whole tensor name only in such a file."""
    hint: str
    beside: str = ""
    """Regular expression that another name of such a file matches; "" for none."""


_DEQUANTIZE = (
    "dequantize it first, where it can be loaded: model.dequantize(), then "
    "model.save_pretrained(DIR); or use the checkpoint that it was made from"
)

#: Properties, the most specific first.
WHOLES: tuple[Whole, ...] = (
    Whole(
        "is quantized to 4 bits by bitsandbytes (NF4 or FP4)",
        r".*\.quant_state\.bitsandbytes__\w+",
        _DEQUANTIZE,
    ),
    Whole(
        "is quantized to 4 bits by bitsandbytes", r".*\.(nested_)?(absmax|quant_map)", _DEQUANTIZE
    ),
    Whole("is quantized to 8 bits by bitsandbytes", r".*\.(SCB|weight_format)", _DEQUANTIZE),
    Whole("is quantized by GPTQ", r".*\.qweight", _DEQUANTIZE, beside=r".*\.g_idx"),
    Whole("is quantized by AWQ", r".*\.qweight", _DEQUANTIZE, beside=r".*\.qzeros"),
    Whole("is quantized by compressed-tensors", r".*\.weight_packed", _DEQUANTIZE),
    Whole("is quantized by HQQ", r".*\.W_q", _DEQUANTIZE),
    Whole("is quantized to FP8", r".*\.weight_scale(_inv)?", _DEQUANTIZE),
    Whole("is quantized by EETQ or Quanto", r".*\.(weight_scales|weight\._data)", _DEQUANTIZE),
    Whole(
        "holds an unmerged adapter beside its weights",
        r".*\.lora_[AB](\.\w+)?\.weight",
        "merge it where it can be loaded: model.merge_and_unload(), then "
        "model.save_pretrained(DIR)",
    ),
)


def whole_problem(tensors: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """Return why no tensor of a file can be read as a weight, in one line, and a hint; None if they
    can."""
    if len(prefixes := sorted(model_prefixes(tensors))) > 1:
        shown = " and ".join(repr(p) if p else "no prefix" for p in prefixes)
        drop = " ".join(f"--drop '{p}*'" for p in prefixes[1:])
        return (
            f"holds {len(prefixes)} models, whose names of tensors begin with {shown}",
            f"convert one of them and leave out the others, for example with {drop}",
        )
    for whole in WHOLES:
        names = [n for n in tensors if re.fullmatch(whole.name, n)]
        if not names or not (
            not whole.beside or any(re.fullmatch(whole.beside, n) for n in tensors)
        ):
            continue
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{whole.what}: it holds {names[0]!r}{more}", whole.hint
    return None


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known of tensors that are not those their config calls for."""

    findings: Sequence[Finding]
    scheme: Scheme
    config: GPTJConfig

    @property
    def unknown(self) -> list[str]:
        """Names of tensors that are not of this model."""
        return [f.name for f in self.findings if f.role is Role.UNKNOWN]

    @property
    def faulty(self) -> list[Finding]:
        """Weights of this model that are missing or wrong."""
        return [f for f in self.findings if f.tensor and f.problem]

    def has(self, config: GPTJConfig) -> bool:
        """Return whether all tensors of another config are present."""
        return {t.name(self.scheme) for t in table(config)} <= {
            f.name for f in self.findings if f.info
        }


@dataclass(frozen=True, slots=True)
class Hint:
    """A hint, and the condition under which it holds."""

    applies: Callable[[Situation], bool]
    text: Callable[[Situation], str]


def _lacks_head(s: Situation) -> bool:
    missing = {f.name for f in s.faulty if not f.info}
    names = {t.name(s.scheme) for t in head(s.config)}
    weights = {n for n in names if n.startswith(HEAD_WEIGHT.layer)}
    return (
        s.scheme is Scheme.HF
        and bool(weights)
        and missing == weights
        and len(s.faulty) == len(missing)
    )


def _lacks_tied_head(s: Situation) -> bool:
    tied = replace(s.config, tie_word_embeddings=True)
    missing = [f.tensor.hf for f in s.faulty if f.tensor]
    return not s.config.tie_word_embeddings and missing == [HEAD_WEIGHT.hf] and s.has(tied)


def _has_other_head(s: Situation) -> bool:
    head_name = HEAD_WEIGHT.hf if s.scheme is Scheme.HF else None
    return s.config.tie_word_embeddings and head_name in s.unknown


def _only_more(s: Situation) -> bool:
    return bool(s.unknown) and not s.faulty


def drop_options(names: Sequence[str]) -> str:
    """Return the options that drop these tensors, one for each part of the model."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[0], []).append(name)
    patterns = [own[0] if len(own) == 1 else f"'{part}.*'" for part, own in parts.items()]
    shown = " ".join(f"--drop {p}" for p in patterns[:4])
    return shown if len(patterns) <= 4 else f"{shown} …"


#: Hints; the first whose condition holds is given.
HINTS: tuple[Hint, ...] = (
    Hint(
        _lacks_head,
        lambda s: (
            "save the GPTJForCausalLM that this GPTJModel without a head came from "
            "(a head is never invented)"
        ),
    ),
    Hint(
        _lacks_tied_head,
        lambda s: "set tie_word_embeddings to true in config.json: the file holds a tied model",
    ),
    Hint(
        _has_other_head,
        lambda s: (
            "set tie_word_embeddings to false in config.json if the file is right: it holds a "
            "head of its own"
        ),
    ),
    Hint(
        _only_more,
        lambda s: f"convert with {drop_options(s.unknown)}; the model itself is complete",
    ),
)


def hint(findings: Sequence[Finding], scheme: Scheme, config: GPTJConfig) -> str | None:
    """Return what may have happened to a file that differs from its config, and how to fix it."""
    situation = Situation(findings, scheme, config)
    return next((h.text(situation) for h in HINTS if h.applies(situation)), None)
