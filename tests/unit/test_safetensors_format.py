"""Safetensors files: exchanged with the library bit for bit; anything else is refused."""

from __future__ import annotations

import gc
import json
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.containers.layout import Layout
from gptj_convert.formats.containers.safetensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    SafetensorsSource,
    safetensors_file,
)
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, read_rows, read_tensor
from tests.unit.writing import write

MIB = 2**20

on_one_path = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


# Files of any content.


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Tensors of any dtype with any bits, NaN payloads included."""
    dtype = NUMPY[draw(st.sampled_from(list(DTYPES.values())))]
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    return (data & 1 if dtype.name == "bool" else data).view(dtype).reshape(shape)


names = st.text(max_size=20).filter(lambda n: n != "__metadata__")
contents = st.dictionaries(names, arrays(), max_size=6)


def as_torch(values: np.ndarray) -> torch.Tensor:
    raw = torch.from_numpy(np.array(values).reshape(-1).view(np.uint8))
    return raw.view(getattr(torch, values.dtype.name)).reshape(values.shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_reads(path: Path, expected: Mapping[str, np.ndarray]) -> None:
    source = SafetensorsSource(path)
    assert dict(source.tensors) == {
        n: TensorInfo(a.dtype.name, a.shape) for n, a in expected.items()
    }
    for name, want in expected.items():
        got = read_tensor(source, name)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.tobytes() == want.tobytes()
    source.close()
    source.close()


@on_one_path
@given(contents, st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
def test_reads_files_that_the_library_wrote(tmp_path, content, metadata):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file(
        {n: as_torch(a) for n, a in content.items()}, path, metadata or None
    )
    assert_reads(path, content)
    content = {n: a for n, a in content.items() if a.dtype.name != "bfloat16"}
    safetensors.numpy.save_file(content, path)
    assert_reads(path, content)


@on_one_path
@given(contents.filter(bool), st.data())
def test_reads_any_range(tmp_path, content, data):
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({n: as_torch(a) for n, a in content.items()}, path)
    source = SafetensorsSource(path)
    for name, values in content.items():
        begin = data.draw(st.integers(0, values.nbytes))
        end = data.draw(st.integers(begin, values.nbytes))
        buffer = bytearray(end - begin)
        source.read_into(name, begin, memoryview(buffer))
        assert buffer == values.tobytes()[begin:end]
        if values.ndim:
            assert read_rows(source, name, len(values) // 2, None).tobytes() == (
                values[len(values) // 2 :].tobytes()
            )
    source.close()


@on_one_path
@given(contents, st.dictionaries(st.text(max_size=8), st.text(max_size=8)))
def test_the_library_reads_a_new_file(tmp_path, content, metadata):
    path = tmp_path / "m.safetensors"
    path.unlink(missing_ok=True)
    infos = {n: TensorInfo(a.dtype.name, a.shape) for n, a in content.items()}
    layout = Layout(infos, (safetensors_file(path.name, infos, metadata),), lambda crcs: {})
    write(layout, tmp_path, content)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == content.keys()
    for name, want in content.items():
        assert tuple(loaded[name].shape) == want.shape
        assert loaded[name].dtype == getattr(torch, want.dtype.name)
        assert bits(loaded[name]) == want.tobytes()
    with safetensors.safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata
    assert_reads(path, content)


def test_one_tensor_gives_the_librarys_own_bytes(tmp_path):
    values, metadata = np.arange(5, dtype=np.float32), {"format": "pt"}
    layout = Layout(
        {"a": (info := TensorInfo("float32", (5,)))},
        (safetensors_file("x.safetensors", {"a": info}, metadata),),
        lambda checksums: {},
    )
    write(layout, tmp_path, {"a": values})
    expected = safetensors.numpy.save({"a": values}, metadata)
    assert (tmp_path / "x.safetensors").read_bytes() == expected


def test_the_bytes_begin_at_a_multiple_of_eight():
    for n in range(1, 17):
        file = safetensors_file("x", {"x" * n: TensorInfo("float64", (1,))}, {})
        assert isinstance(file.parts[0], bytes)
        assert len(file.parts[0]) % 8 == 0


# Headers that break a rule.


def file_of(header: bytes | str | dict[str, Any], data: bytes = bytes(8)) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: str = "[2]", span: str = "[0,8]", dtype: str = '"F32"', name: str = "w") -> str:
    return f'"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{span}}}'


def one(**fields: str) -> bytes:
    return file_of("{" + entry(**fields) + "}")


def two(second: str, data: int = 16) -> bytes:
    return file_of("{" + entry() + "," + second + "}", bytes(data))


def filled(unit: str) -> bytes:
    """Return a header of the largest size with many small values."""
    text = ",".join([unit] * ((MAX_HEADER_BYTES - 64) // (len(unit) + 1)))
    return file_of(f'{{"w":{{"dtype":"F32","shape":[{text}],"data_offsets":[0,8]}}}}')


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty, expected weights"),
    "seven bytes": (bytes(7), "has 7 bytes, expected a header of at least 8"),
    "length 0": (struct.pack("<Q", 0) + b"{}", "header length is 0, expected 2 to"),
    "length 1": (struct.pack("<Q", 1) + b"{}", "header length is 1, expected 2 to"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", f"header length is {2**63}"),
    "length 2^64-1": (struct.pack("<Q", 2**64 - 1) + b"{}", f"header length is {2**64 - 1}"),
    "length above the cap": (file_of(b"{" + b" " * MAX_HEADER_BYTES + b"}"), "expected 2 to"),
    "longer than the file": (struct.pack("<Q", 99) + b"{}", "is 99 bytes, but the file has only"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "HTML": (b"\n<!DOCTYPE html><html>404</html>", "an HTML page"),
    "HTML in capitals": (b"<HTML>" + bytes(90), "an HTML page"),
    "not UTF-8": (file_of(b'{"\xff":1}'), "not valid JSON: 'utf-8' codec can't decode"),
    "UTF-16": (file_of("{}".encode("utf-16")), "does not begin with '{'"),
    "not JSON": (file_of(b"{weights}"), "header is not valid JSON"),
    "two values": (file_of("{}{}"), "not valid JSON: Extra data"),
    "NUL after": (file_of(b"{}\0\0"), "not valid JSON: Extra data"),
    "blank first": (file_of(" {}"), "does not begin with '{'"),
    "a list": (file_of("[1]"), "does not begin with '{'"),
    "null": (file_of("null"), "does not begin with '{'"),
    "deep list": (file_of('{"w":' + "[" * 100_000), "not valid JSON: maximum recursion depth"),
    "deep object": (file_of('{"w":' * 100_000), "not valid JSON: maximum recursion depth"),
    "deep dtype": (one(dtype="[" * 500 + "]" * 500), "tensor 'w': dtype is [["),
    "deep shape": (one(shape="[" * 500 + "]" * 500), "tensor 'w': shape is [["),
    "5,000 digits": (one(shape=f"[{'9' * 5000}]"), "Exceeds the limit (4300 digits)"),
    "4,000 digits": (one(shape=f"[{'9' * 4000}]"), "tensor 'w': shape is [999"),
    "4 MiB of long numbers": (filled("9" * 4000), "tensor 'w': shape is [999"),
    "16 MiB of lists": (filled("[]"), "holds more than 262144 values"),
    "16 MiB of objects": (filled('{"":0}'), "holds more than 262144 values"),
    "16 MiB of zeros": (filled("0"), "holds more than 262144 values"),
    "size 1.5": (one(shape="[1.5]"), "tensor 'w': shape is [1.5], expected a list of whole"),
    "size 2.0": (one(shape="[2.0]"), "tensor 'w': shape is [2.0]"),
    "size 2e0": (one(shape="[2e0]"), "tensor 'w': shape is [2.0]"),
    "size true": (one(shape="[2,true]"), "tensor 'w': shape is [2, True]"),
    "size -1": (one(shape="[-1,-2]"), "tensor 'w': shape is [-1, -2]"),
    "size -0": (one(shape="[-0]", span="[0,0]"), "tensor 'w': shape is [-0.0]"),
    "size NaN": (one(shape="[NaN]"), "tensor 'w': shape is [nan]"),
    "size null": (one(shape="[null]"), "tensor 'w': shape is [None]"),
    "size as text": (one(shape='["2"]'), "tensor 'w': shape is ['2']"),
    "size 2^63": (one(shape=f"[{2**63}]"), f"tensor 'w': shape is [{2**63}]"),
    "shape is a number": (one(shape="2"), "tensor 'w': shape is 2"),
    "9 dimensions": (one(shape="[1,1,1,1,1,1,1,1,2]"), "tensor 'w': has 9 dimensions"),
    "product 2^64": (one(shape=f"[{2**32},{2**32}]"), "tensor 'w': shape [4294967296, 4294967296]"),
    "bytes 2^64": (one(shape=f"[{2**62}]"), f"tensor 'w': shape [{2**62}] overflows"),
    "product 2^124, and 0": (
        one(shape=f"[{2**62},{2**62},0]", span="[0,0]"),
        "tensor 'w': shape [4611686018427387904, 4611686018427387904, 0] overflows",
    ),
    "offset -1": (one(span="[-1,7]"), "tensor 'w': data_offsets is [-1, 7]"),
    "offset true": (one(span="[false,8]"), "tensor 'w': data_offsets is [False, 8]"),
    "offsets backwards": (one(span="[8,0]"), "tensor 'w': data_offsets span -8 bytes"),
    "one offset": (one(span="[8]"), "tensor 'w': data_offsets is not a pair"),
    "three offsets": (one(span="[0,4,8]"), "tensor 'w': data_offsets is not a pair"),
    "span of another size": (one(shape="[3]"), "span 8 bytes, float32 of shape [3] needs 12"),
    "span larger than needed": (one(shape="[1]"), "span 8 bytes, float32 of shape [1] needs 4"),
    "unknown dtype": (one(dtype='"F8_E4M3"'), "tensor 'w': dtype is 'F8_E4M3', expected one of"),
    "dtype null": (one(dtype="null"), "tensor 'w': dtype is None"),
    "dtype in small letters": (one(dtype='"f32"'), "tensor 'w': dtype is 'f32'"),
    "entry is a list": (file_of('{"w":[]}'), "tensor 'w': its entry is not {dtype, shape"),
    "entry lacks dtype": (file_of({"w": {"shape": [2], "data_offsets": [0, 8]}}), "tensor 'w': "),
    "entry has more": (file_of("{" + entry()[:-1] + ',"x":1}}'), "tensor 'w': its entry is not"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__ is not an object"),
    "metadata is a list": (file_of({"__metadata__": []}), "__metadata__ is not an object"),
    "key twice": (two(entry(span="[8,16]")), "key 'w' occurs twice"),
    "key twice, one escaped": (two(entry(span="[8,16]", name="\\u0077")), "key 'w' occurs twice"),
    "field twice": (file_of("{" + entry()[:-1] + ',"shape":[2]}}'), "key 'shape' occurs twice"),
    "half a surrogate pair": (one(name="\\ud800"), "surrogates not allowed"),
    "half a pair in metadata": (file_of('{"__metadata__":{"a":"\\udc00"}}', b""), "surrogates not"),
    "overlap": (two(entry(span="[4,12]", name="v"), 12), "tensor 'v': overlaps the tensor before"),
    "same place": (two(entry(name="v"), 8), "overlaps the tensor before it: begins at 0"),
    "hole": (two(entry(span="[12,20]", name="v"), 20), "'v': leaves a gap before it: begins at 12"),
    "hole at first": (one(span="[4,12]"), "tensor 'w': leaves a gap before it: begins at 4"),
    "trailing byte": (one() + b"\0", "bytes, its header calls for"),
    "missing byte": (one()[:-1], "bytes, its header calls for"),
    "data without tensors": (file_of("{}"), "has 18 bytes, its header calls for 10"),
    "escape in the name": (one(name="\\u001b[2J", shape="[3]"), "tensor '\\x1b[2J': data_offsets"),
    "long name": (one(name="x" * MIB, shape="[3]"), "...xxx"),
    "long dtype": (one(dtype=f'"{"x" * MIB}"'), "...xxx"),
}


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def frozen():
    """Keep the garbage collector from visiting objects of other test modules."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_hostile_headers_fast_and_small(tmp_path, case):
    content, expected = HOSTILE[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    descriptors = open_descriptors()
    begin = time.process_time()
    with pytest.raises(FileFault) as e:
        SafetensorsSource(path)
    assert time.process_time() - begin < 1
    assert open_descriptors() == descriptors
    assert e.value.message.startswith(f"{path}: ")
    assert expected in e.value.message
    assert e.value.message.isprintable()
    assert len(e.value.message) < 1000
    tracemalloc.start()
    try:
        with pytest.raises(FileFault):
            SafetensorsSource(path)
        assert tracemalloc.get_traced_memory()[1] < MIB + 64 * len(content)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", ["empty file", "seven bytes", "longer than the file", "HTML"])
def test_a_broken_download_says_what_to_do(tmp_path, case):
    (tmp_path / "m.safetensors").write_bytes(HOSTILE[case][0])
    with pytest.raises(FileFault) as e:
        SafetensorsSource(tmp_path / "m.safetensors")
    assert "gptj download" in str(e.value.hint)


def test_a_large_header_length_in_a_large_file_allocates_nothing(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 2**33) + b"{")
    os.truncate(path, 2**34)
    tracemalloc.start()
    try:
        with pytest.raises(FileFault, match="header length is 8589934592"):
            SafetensorsSource(path)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = two(entry(name="v", span="[8,16]"))
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    SafetensorsSource(path).close()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        with pytest.raises(FileFault, match=r"m\.safetensors: "):
            SafetensorsSource(path)


def test_a_file_cut_after_opening_names_tensor_and_place(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(one())
    source = SafetensorsSource(path)
    end = path.stat().st_size - 3
    os.truncate(path, end)
    with pytest.raises(
        FileFault, match=f"ends at byte {end} inside tensor 'w', expected 3 more bytes"
    ):
        read_tensor(source, "w")


# Damage of any kind: never laxer than the library, and no other exception.


def agrees_if_read(path: Path, content: bytes) -> bool:
    """Return whether a file was read; if so, the library must read the same content."""
    path.write_bytes(content)
    try:
        source = SafetensorsSource(path)
    except FileFault as e:
        fault = e
    else:
        fault = None
    if fault:
        assert fault.message.startswith(f"{path}: ")
        assert fault.message.isprintable()
        return False
    theirs = dict(safetensors.deserialize(content))
    assert theirs.keys() == source.tensors.keys()
    for name, info in source.tensors.items():
        assert tuple(theirs[name]["shape"]) == info.shape
        assert DTYPES[theirs[name]["dtype"]] == info.dtype
        assert bytes(theirs[name]["data"]) == read_tensor(source, name).tobytes()
    source.close()
    return True


odd_numbers = st.sampled_from(
    ["0", "1", "2", "4", "8", "12", "16", "-0", "-1", "01", "1.0", "1e0", "true", "null", "NaN"]
    + [str(2**n) for n in (32, 61, 62, 63, 64)]
)
odd_lists = st.lists(odd_numbers, max_size=3).map(lambda ns: f"[{','.join(ns)}]")
odd_names = st.sampled_from(
    ["a", "b", "\\u0061", "\\ud800", "\\ud83d\\ude00", "\t", "\x7f", "é", ""]
)
odd_entries = st.builds(
    entry,
    name=odd_names,
    shape=odd_lists,
    span=odd_lists | st.sampled_from(["[0,0]", "[0,4]", "[0,8]", "[4,8]", "[8,16]"]),
    dtype=st.sampled_from(['"F32"', '"F16"', '"BF16"', '"U8"', '"F8_E5M2"', '"f32"', "1"]),
)


@settings(on_one_path, max_examples=800)
@given(st.lists(odd_entries, max_size=3), st.sampled_from([0, 4, 8, 16]))
def test_is_never_laxer_than_the_library(tmp_path, entries, size):
    agrees_if_read(tmp_path / "m.safetensors", file_of(f"{{{','.join(entries)}}}", bytes(size)))


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(out))
        match rng.randrange(5):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + rng.randint(0, 4)] = rng.choice(b'0 1 9 , : [ ] { } " - e'.split())
            case 3:
                other = rng.randrange(len(out))
                out[at : at + 8] = out[other : other + 8]
            case 4:
                del out[at : at + rng.randint(1, 8)]
    if rng.random() < 0.8 and len(out) > 24:  # Else most end at the header's length.
        out[:8] = struct.pack("<Q", len(out) - 8 - 16)
    return bytes(out)


def test_damaged_files_are_read_like_the_library_or_refused(tmp_path):
    rng = random.Random(5)
    whole = two(entry(name="\\u00e9", span="[8,16]", dtype='"I64"', shape="[1]"))
    read = sum(agrees_if_read(tmp_path / "m", mutated(whole, rng)) for _ in range(2000))
    assert 20 < read < 1000
