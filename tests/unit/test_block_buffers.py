"""Block buffers: blocks of any stored dtype are read into the same buffers in turn."""

from __future__ import annotations

import numpy as np
import pytest

from gptj_model.config import GPTJConfig
from gptj_model.dtypes import NUMPY
from gptj_model.network.weights import read_values
from gptj_model.source import TensorInfo
from gptj_model.streaming.block_buffers import BlockBuffers
from gptj_model.tensors import Scheme, block
from tests.small_model import SMALL

CONFIG = GPTJConfig(**SMALL)


class _Arrays:
    """A source whose blocks are stored in these dtypes, in turn."""

    def __init__(self, scheme: Scheme, dtypes: tuple[str, ...]) -> None:
        random = np.random.default_rng(0)
        self._arrays = {
            t.name(scheme): random.normal(size=t.shape_in(scheme)).astype(
                NUMPY[dtypes[i % len(dtypes)]]
            )
            for i in range(CONFIG.n_layer)
            for t in block(CONFIG, i)
        }
        self.tensors = {n: TensorInfo(a.dtype.name, a.shape) for n, a in self._arrays.items()}
        self.reads = 0

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        buffer[:] = self._arrays[name].tobytes()[offset : offset + len(buffer)]

    def close(self) -> None:
        """Do nothing: no file is open."""


STORED = [("float32",), ("float16",), ("bfloat16", "float64", "float32")]


@pytest.mark.parametrize("dtypes", STORED, ids="-".join)
@pytest.mark.parametrize("scheme", [Scheme.HF, Scheme.TF])
def test_every_block_as_it_is_computed_with(scheme: Scheme, dtypes: tuple[str, ...]):
    source = _Arrays(scheme, dtypes)
    memory = BlockBuffers(CONFIG, scheme, source.tensors)
    addresses, own = set(), []
    for i in [*range(CONFIG.n_layer), *reversed(range(CONFIG.n_layer))]:
        expected = [read_values(t, source, scheme, "float32") for t in block(CONFIG, i)]
        stored = memory.read(source, i)
        own.append((memory.lay_out(i, stored, own=True), expected))
        found = memory.lay_out(i, stored, own=False)
        addresses.add(found[0].ctypes.data)
        for values, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(values, wanted, strict=True)
    direct = scheme is Scheme.TF and dtypes == ("float32",)
    assert len(addresses) == (2 if direct else 1)
    for found, expected in own:
        for values, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(values, wanted, strict=True)


def test_the_last_two_blocks_stay_for_the_way_back():
    source = _Arrays(Scheme.TF, ("float32",))
    memory = BlockBuffers(CONFIG, Scheme.TF, source.tensors)
    for i in range(3):
        memory.read(source, i)
    before = source.reads
    memory.read(source, 2)
    memory.read(source, 1)
    assert source.reads == before
    memory.read(source, 0)
    assert source.reads > before


def test_a_block_in_the_place_of_the_one_before():
    source = _Arrays(Scheme.TF, ("float32",))
    memory = BlockBuffers(CONFIG, Scheme.TF, source.tensors)
    first = memory.read(source, 0)[0].ctypes.data
    assert memory.read(source, 1, over=True)[0].ctypes.data == first
    assert memory.read(source, 2)[0].ctypes.data != first
