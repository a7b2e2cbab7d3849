"""Faults planted in memory while a checkpoint is read, to see that verification finds them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.op import Op
from gptj_model.source import TensorInfo, TensorSource, raw_bytes, read_tensor
from gptj_model.tensors import (
    BLOCK,
    HEAD_BIAS,
    KEY,
    NORM,
    OUTPUT,
    QUERY,
    VALUE,
    Scheme,
    block,
    embedding,
    head,
    table,
)

Rule = Callable[[np.ndarray], np.ndarray]
"""Changes a tensor's values in HF's layout, keeping shape and dtype."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedFault:
    """One mistake that a conversion may make."""

    what: str
    rules: Mapping[str, Rule] = field(default_factory=dict)
    """Changes of values, by HF name."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """HF name of the tensor that is read instead, by HF name."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config that are changed."""

    @property
    def tensors(self) -> set[str]:
        """HF names of the tensors that are wrong."""
        return {*self.rules, *self.origins}


def planted_faults(config: GPTJConfig) -> list[PlantedFault]:
    """Return faults of every kind, in blocks at both ends and in the middle."""
    first, middle, last = 0, config.n_layer // 2, config.n_layer - 1
    fc_in, _, fc_out, _ = BLOCK[-4:]
    faults = [
        *(
            PlantedFault(
                what=f"{row.at(i)}: the transposition skipped",
                rules={row.at(i): lambda v: v.T.reshape(v.shape)},
            )
            for i, row in ((first, QUERY), (middle, KEY), (middle, OUTPUT), (last, fc_in))
        ),
        _exchanged(QUERY.at(middle), KEY.at(middle)),
        _exchanged(VALUE.at(first), OUTPUT.at(first)),
        _exchanged(*(row.at(middle) for row in NORM)),
        PlantedFault(
            what=f"block {first}: queries and keys in the order of split rotary halves",
            rules={row.at(first): _by_head(config, _split_halves) for row in (QUERY, KEY)},
        ),
        PlantedFault(
            what=f"{VALUE.at(last)}: one head's rows moved on by one",
            rules={VALUE.at(last): _by_head(config, _one_head_moved)},
        ),
        PlantedFault(
            what=f"block {middle}: rounded to bfloat16 on the way",
            rules={t.hf: _rounded for t in block(config, middle)},
        ),
        PlantedFault(
            what=f"{fc_out.at(middle)}: one value off by 0.001",
            rules={fc_out.at(middle): _one_value_off},
        ),
        PlantedFault(
            what=f"{VALUE.at(last)}: the lowest bit of one value flipped",
            rules={VALUE.at(last): _lowest_bit_flipped},
        ),
        PlantedFault(
            what=f"{embedding(config).hf}: rows shifted by one",
            rules={embedding(config).hf: lambda v: np.roll(v, 1, axis=0)},
        ),
        PlantedFault(what=f"{HEAD_BIAS.hf}: zeroed", rules={HEAD_BIAS.hf: np.zeros_like}),
        PlantedFault(
            what="config: layer_norm_epsilon ten times as large",
            fields={"layer_norm_epsilon": 10 * config.layer_norm_epsilon},
        ),
    ]
    if first != last:
        pairs = zip(block(config, first), block(config, last), strict=True)
        origins = {x.hf: y.hf for a, b in pairs for x, y in ((a, b), (b, a))}
        faults.append(PlantedFault(what=f"blocks {first} and {last} exchanged", origins=origins))
    if config.rotary_dim > 2:
        smaller = {"rotary_dim": config.rotary_dim - 2}
        faults.append(PlantedFault(what="config: two rotary features fewer", fields=smaller))
    if config.n_head % 2 == 0 and config.rotary_dim <= 2 * config.head_dim:
        fewer = {"n_head": config.n_head // 2}
        faults.append(PlantedFault(what="config: half as many heads", fields=fewer))
    return faults


def _exchanged(a: str, b: str) -> PlantedFault:
    return PlantedFault(what=f"{a} and {b} exchanged", origins={a: b, b: a})


def _by_head(config: GPTJConfig, rule: Callable[[np.ndarray, GPTJConfig], np.ndarray]) -> Rule:
    """Return a rule that works on (heads, features of a head, …) of a projection's rows."""

    def apply(values: np.ndarray) -> np.ndarray:
        heads = values.reshape(config.n_head, config.head_dim, -1)
        return rule(heads, config).reshape(values.shape)

    return apply


def _split_halves(heads: np.ndarray, config: GPTJConfig) -> np.ndarray:
    n = config.rotary_dim
    order = [*range(0, n, 2), *range(1, n, 2), *range(n, config.head_dim)]
    return heads[:, order]


def _one_head_moved(heads: np.ndarray, config: GPTJConfig) -> np.ndarray:
    moved = heads.copy()
    moved[-1] = np.roll(heads[-1], 1, axis=0)
    return moved


def _rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(values.dtype)


def _one_value_off(values: np.ndarray) -> np.ndarray:
    changed = values.copy()
    place = tuple(n // 2 for n in values.shape)
    changed[place] += np.asarray(1e-3, values.dtype)
    return changed


def _lowest_bit_flipped(values: np.ndarray) -> np.ndarray:
    changed = np.ascontiguousarray(values).copy()
    bits = changed.reshape(-1).view(f"u{values.itemsize}")
    bits[bits.size // 2] ^= 1
    return changed


class FaultySource:
    """A `TensorSource` that is read with a fault in it.

    Args:
        source, scheme: sound source, and the scheme of its names.
        config: configuration of the model.
        fault: fault to plant.
    """

    def __init__(
        self, source: TensorSource, scheme: Scheme, config: GPTJConfig, fault: PlantedFault
    ) -> None:
        self._source = source
        self._scheme = scheme
        by_hf = {t.hf: t for t in table(config)}
        self._rules = {
            name: (by_hf[hf], rule)
            for hf, rule in fault.rules.items()
            for name in (by_hf[hf].name(scheme), *by_hf[hf].copies(scheme))
        }
        self._origins = {
            by_hf[hf].name(scheme): by_hf[other].name(scheme) for hf, other in fault.origins.items()
        }
        self._held: tuple[str, memoryview] | None = None
        self.tensors: dict[str, TensorInfo] = dict(source.tensors)
        """Tensors of the sound source; one with a rule is row-major."""
        for name in self._rules:
            self.tensors[name] = replace(self.tensors[name], storage_op=Op.COPY)
        for name, other in self._origins.items():
            self.tensors[name] = source.tensors[other]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Implement `TensorSource`; a tensor with a rule is held whole until another one is
        read."""
        if name not in self._rules:
            self._source.read_into(self._origins.get(name, name), offset, buffer)
            return
        if self._held is None or self._held[0] != name:
            self._held = name, raw_bytes(self._changed(name))
        buffer[:] = self._held[1][offset : offset + len(buffer)]

    def _changed(self, name: str) -> np.ndarray:
        tensor, rule = self._rules[name]
        op: Op = tensor.op(self._scheme, Scheme.HF)
        values = read_tensor(self._source, name)
        return np.ascontiguousarray(op(rule(op(values)))).astype(
            NUMPY[self.tensors[name].dtype], copy=False
        )

    def close(self) -> None:
        """Do nothing: the source has no file of its own."""


@contextmanager
def reading(model: Any, source: TensorSource) -> Generator[None]:
    """Let a streamed model read its weights from another source."""
    before, model.source = model.source, source
    try:
        yield
    finally:
        model.source = before


def damaged_stages(config: GPTJConfig, fault: PlantedFault) -> set[int | str]:
    """Return the blocks, by number, and "embedding" and "head", that are read differently with a
    fault."""
    found: set[int | str] = set()
    if embedding(config).hf in fault.tensors:
        found.add("embedding")
        if config.tie_word_embeddings:
            found.add("head")
    if fault.tensors & {t.hf for t in head(config)}:
        found.add("head")
    return found | {t.block for t in table(config) if t.block is not None and t.hf in fault.tensors}
