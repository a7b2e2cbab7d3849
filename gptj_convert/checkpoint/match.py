"""Tensors of a file matched against the table, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from gptj_convert.streams.strips import Panels
from gptj_model.config import GPTJConfig
from gptj_model.dtypes import FLOATS
from gptj_model.op import Op
from gptj_model.source import TensorInfo, TensorSource, raw_bytes
from gptj_model.tensors import (
    EMBEDDING,
    HEAD_WEIGHT,
    Scheme,
    Tensor,
    ignored_hf,
    is_training_state,
    table,
)


class Role(Enum):
    """What a tensor in a file is."""

    WEIGHT = "weight"
    """A row of the table."""
    COPY = "copy"
    """The values of another tensor again, judging by name and shape, such as a head tied to the
    embedding."""
    TRAINING_STATE = "training state"
    IGNORED = "ignored buffer"
    UNKNOWN = "unknown"
    UNMATCHED = "unmatched"
    """Possibly a weight: without a config there is no table to match."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One tensor that a file holds or lacks."""

    name: str
    """Name in the source."""
    info: TensorInfo | None
    """Dtype and shape; None if the file lacks the tensor."""
    role: Role
    tensor: Tensor | None = None
    """Its row of the table."""
    problem: str | None = None
    """How it differs from what the config calls for."""
    copy_of: str | None = None
    """Name of the tensor that it repeats, if it is a copy."""


def survey(
    tensors: Mapping[str, TensorInfo], scheme: Scheme, config: GPTJConfig | None
) -> list[Finding]:
    """Return a finding for every row of the table in its order, then for every other tensor in the
    file's order."""
    left = dict.fromkeys(tensors)
    found, copies = [], {}
    for tensor in table(config) if config else ():
        name = tensor.name(scheme)
        copies |= dict.fromkeys(tensor.copies(scheme), name)
        left.pop(name, None)
        info = tensors.get(name)
        problem = _problem(name, info, tensor.shape_in(scheme))
        found.append(Finding(name, info, Role.WEIGHT, tensor, problem))
    if config and scheme is Scheme.HF:
        copies[HEAD_WEIGHT.hf] = EMBEDDING.hf
    dropped = ignored_hf(config) if config and scheme is Scheme.HF else frozenset()
    for name in left:
        original = copies.get(name)
        if name in dropped:
            role = Role.IGNORED
        elif is_training_state(name, scheme):
            role = Role.TRAINING_STATE
        elif config is None:
            role = Role.UNMATCHED
        elif _alike(tensors, name, original):
            role = Role.COPY
        else:
            role = Role.UNKNOWN
        problem = _unknown(name) if role is Role.UNKNOWN else None
        copy_of = original if role is Role.COPY else None
        found.append(Finding(name, tensors[name], role, problem=problem, copy_of=copy_of))
    return found


def _alike(tensors: Mapping[str, TensorInfo], name: str, original: str | None) -> bool:
    """Return whether two tensors have the same dtype and shape, and so may be equal."""
    other = tensors.get(original) if original else None
    return other is not None and tensors[name].kind == other.kind


def settle_copies(findings: Sequence[Finding], source: TensorSource) -> list[Finding]:
    """Compare every `COPY` with its original; a copy that differs becomes a problem."""

    def settled(finding: Finding) -> Finding:
        if finding.copy_of is None:
            return finding
        names = (finding.name, finding.copy_of)
        if same_bits(*(Panels(source, name, Op.COPY) for name in names)):
            return finding
        problem = f"{finding.name!r} differs from {finding.copy_of!r}, expected an equal copy"
        return replace(finding, role=Role.UNKNOWN, problem=problem)

    return [settled(finding) for finding in findings]


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
    """Return whether two streams of arrays hold the same bytes, however they are cut."""
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
