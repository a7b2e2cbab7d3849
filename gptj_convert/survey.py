"""What every tensor of a file is, by the table, decided from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from gptj_convert.panels import Panels
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import FLOATS
from gptj_model.source import TensorInfo, TensorSource, raw_bytes
from gptj_model.tensors import (
    EMBEDDING,
    HEAD_WEIGHT,
    Op,
    Scheme,
    Tensor,
    ignored_hf,
    is_training_state,
    table,
)

#: What the names of a Hugging Face GPTJModel lack of those of the GPTJForCausalLM around it.
_MODEL_PREFIX = "transformer."


class Role(Enum):
    """What a tensor of a file is."""

    WEIGHT = "weight"
    """A row of the table."""
    TIED_HEAD = "tied head"
    """By name and shape the embedding once more, in a model whose head is tied to it."""
    TRAINING_STATE = "training state"
    IGNORED = "ignored buffer"
    UNKNOWN = "unknown"
    UNMATCHED = "unmatched"
    """Perhaps a weight: without a config there is no table."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One tensor that a file holds, or lacks."""

    name: str
    """In the file."""
    info: TensorInfo | None
    """None: it is not there."""
    role: Role
    tensor: Tensor | None = None
    """Its row of the table."""
    problem: str | None = None
    """How it is not what the config calls for."""


def survey(
    tensors: Mapping[str, TensorInfo], scheme: Scheme, config: GPTJConfig | None
) -> list[Finding]:
    """Every row of the table, in its order, then every other tensor, in the file's order."""
    prefix = _prefix_left_out(tensors, scheme)
    left = {prefix + name: name for name in tensors}
    found = []
    for tensor in table(config) if config else ():
        (full_name,) = tensor.names(scheme)
        name = left.pop(full_name, None)
        info = None if name is None else tensors[name]
        name = full_name.removeprefix(prefix) if name is None else name
        problem = _problem(name, info, tensor.shape_in(scheme))
        found.append(Finding(name, info, Role.WEIGHT, tensor, problem))
    dropped = ignored_hf(config) if config and scheme is Scheme.HF else frozenset()
    for full_name, name in left.items():
        if full_name in dropped:
            role = Role.IGNORED
        elif scheme is Scheme.TF and is_training_state(name):
            role = Role.TRAINING_STATE
        elif config is None:
            role = Role.UNMATCHED
        elif full_name == HEAD_WEIGHT.hf and tensors[name] == tensors.get(EMBEDDING.hf):
            role = Role.TIED_HEAD
        else:
            role = Role.UNKNOWN
        problem = _unknown(name) if role is Role.UNKNOWN else None
        found.append(Finding(name, tensors[name], role, problem=problem))
    return found


def settle_tied_head(findings: Sequence[Finding], source: TensorSource) -> list[Finding]:
    """Read a `TIED_HEAD`; one that is not the embedding, bit for bit, is unknown."""

    def is_other(finding: Finding) -> bool:
        names = (finding.name, EMBEDDING.hf)
        return not same_bits(*(Panels(source, name, Op.COPY) for name in names))

    return [
        replace(f, role=Role.UNKNOWN, problem=_unknown(f.name))
        if f.role is Role.TIED_HEAD and is_other(f)
        else f
        for f in findings
    ]


def hint(findings: Sequence[Finding], scheme: Scheme, config: GPTJConfig) -> str | None:
    """What may have happened to a file that is not what its config calls for, and the way out."""
    if any(f.tensor and f.name not in f.tensor.names(scheme) for f in findings):
        return (
            "this is a GPTJModel without its head; save the GPTJForCausalLM that it came from "
            "(a head is never made up)"
        )
    if config.tie_word_embeddings:
        if any(f.role is Role.UNKNOWN and f.name == HEAD_WEIGHT.hf for f in findings):
            return "config.json ties the head to the embedding, but the file holds another head"
        return None
    tied = table(replace(config, tie_word_embeddings=True))
    if {t.names(scheme)[0] for t in tied} <= {f.name for f in findings if f.info}:
        return "the file holds a tied model: set tie_word_embeddings to true in config.json"
    return None


def _prefix_left_out(tensors: Mapping[str, TensorInfo], scheme: Scheme) -> str:
    """What the names lack when a Hugging Face GPTJModel, which has no head, was saved alone."""
    bare = EMBEDDING.hf.removeprefix(_MODEL_PREFIX)
    headless = scheme is Scheme.HF and EMBEDDING.hf not in tensors and bare in tensors
    return _MODEL_PREFIX if headless else ""


def _problem(name: str, info: TensorInfo | None, expected: tuple[int, ...]) -> str | None:
    if info is None:
        return f"{name!r} is missing, expected shape {list(expected)}"
    if info.shape != expected:
        return f"{name!r} has shape {list(info.shape)}, expected {list(expected)}"
    if info.dtype not in FLOATS:
        return f"{name!r} holds {info.dtype}, expected one of {', '.join(FLOATS)}"
    return None


def _unknown(name: str) -> str:
    return f"{name!r} is not a tensor of this model"


def same_bits(a: Iterable[np.ndarray], b: Iterable[np.ndarray]) -> bool:
    """Whether two streams of arrays, however they are cut, have the same bytes."""
    streams = iter(a), iter(b)
    left = [memoryview(b""), memoryview(b"")]
    while True:
        for n, stream in enumerate(streams):
            while not left[n] and (piece := next(stream, None)) is not None:
                left[n] = raw_bytes(piece)
        count = min(map(len, left))
        if left[0][:count] != left[1][:count]:
            return False
        if not count:
            return not any(left)
        left = [side[count:] for side in left]
