"""TensorFlow bundles: read and written bit for bit like TensorFlow's; anything else is refused."""

from __future__ import annotations

import gc
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.containers.leveldb_table import masked, unmasked
from gptj_convert.formats.containers.tensor_bundle import (
    DTYPES,
    MAX_INDEX_BYTES,
    MAX_TENSORS,
    BundleSource,
    BundleWriter,
    Entry,
    bundle_layout,
    data_path,
    index_path,
    write_bundle,
)
from gptj_model.dtypes import NUMPY
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, read_rows, read_tensor
from tests.unit.writing import write

MIB = 2**20

on_one_path = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@given(st.integers(0, 2**32 - 1))
def test_unmasking_undoes_masking(crc: int):
    assert unmasked(masked(crc)) == crc
    assert 0 <= masked(crc) < 2**32


def remove(prefix: Path) -> Path:
    index_path(prefix).unlink(missing_ok=True)
    data_path(prefix).unlink(missing_ok=True)
    return prefix


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def assert_reads(prefix: Path, expected: Mapping[str, np.ndarray]) -> None:
    source = BundleSource(prefix)
    assert dict(source.tensors) == {
        n: TensorInfo(a.dtype.name, a.shape) for n, a in expected.items()
    }
    for name, want in expected.items():
        assert_same(read_tensor(source, name), want)
        if want.ndim:
            middle = len(want) // 2
            assert_same(read_rows(source, name, middle, None), want[middle:])
        assert source.entries[name].crc == masked(crc32c(want.tobytes()))
    source.close()
    source.close()


def assert_tensorflow_reads(prefix: Path, expected: Mapping[str, np.ndarray]) -> None:
    reader = tf.train.load_checkpoint(str(prefix))
    assert set(reader.get_variable_to_shape_map()) == set(expected)
    for name, want in expected.items():
        assert_same(np.asarray(reader.get_tensor(name)), want)


# Round trips.


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Tensors of any dtype with any bits, NaN payloads included."""
    dtype = NUMPY[draw(st.sampled_from(list(DTYPES.values())))]
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size = int(np.prod(shape, dtype=int)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    return (data & 1 if dtype.name == "bool" else data).view(dtype).reshape(shape)


letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
names = st.text(letters, min_size=1, max_size=20) | st.text("ab/", min_size=1, max_size=9)
contents = st.dictionaries(names, arrays(), max_size=8).map(lambda c: c | {"~": np.ones(1)})


@on_one_path
@given(contents)
def test_is_read_back_by_itself_and_by_tensorflow(tmp_path, content):
    prefix = remove(tmp_path / "m.ckpt")
    write_bundle(prefix, content)
    assert_reads(prefix, content)
    assert_tensorflow_reads(prefix, content)


@settings(on_one_path, max_examples=50)
@given(contents)
def test_a_streamed_bundle_is_read_back_by_itself_and_by_tensorflow(tmp_path, content):
    prefix = remove(tmp_path / "s.ckpt")
    write_streamed(prefix, content)
    assert_reads(prefix, content)
    assert_tensorflow_reads(prefix, content)
    names = sorted(content, key=str.encode)
    assert data_path(prefix).read_bytes() == b"".join(content[n].tobytes() for n in names)


def test_additional_tensors_are_written_last(tmp_path):
    prefix, known = tmp_path / "m.ckpt", np.arange(6, dtype=np.float32)
    late = {"é": np.arange(3), "a": np.float32(2).reshape(()), "b": np.zeros((0, 2), np.float16)}
    with closing(BundleWriter(prefix, {"m": TensorInfo("float32", (6,))})) as writer:
        writer.append("m", known[:2])
        writer.append("m", known[2:])
        writer.finish(late)
    assert_reads(prefix, {"m": known, **late})
    assert_tensorflow_reads(prefix, {"m": known, **late})


def write_streamed(prefix: Path, content: Mapping[str, np.ndarray]) -> None:
    """Write a bundle like a conversion, in the order of TensorFlow."""
    layout = bundle_layout(
        prefix.name, {n: TensorInfo(a.dtype.name, a.shape) for n, a in content.items()}
    )
    checksums = write(layout, prefix.parent, content)
    for name, data in layout.index(checksums).items():
        prefix.with_name(name).write_bytes(data)


@on_one_path
@given(contents)
def test_reads_bundles_that_tensorflow_wrote(tmp_path, content):
    prefix = tmp_path / "m.ckpt"
    save_by_tensorflow(prefix, content)
    assert_reads(prefix, content)


def save_by_tensorflow(prefix: Path, content: Mapping[str, np.ndarray]) -> None:
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(content),
        shape_and_slices=[""] * len(content),
        tensors=[tf.constant(a) for a in content.values()],
    )


def many(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors whose names share long prefixes, enough for several blocks."""
    rng = np.random.default_rng(seed)
    kinds = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
    return {
        f"gptj/transformer/h_._{i // 9}/attn/é{'q' * (i % 9)}/kernel_{seed}": rng.standard_normal(
            [(), (3,), (0, 2), (2, 3)][i % 4]
        ).astype(kinds[i % 3])
        for i in range(count)
    }


@pytest.mark.parametrize("count", [1, 15, 16, 17, 90, 700, 3000])
def test_an_index_of_several_blocks(tmp_path, count):
    content = many(count)
    write_bundle(tmp_path / "ours", content)
    assert_reads(tmp_path / "ours", content)
    assert_tensorflow_reads(tmp_path / "ours", content)
    save_by_tensorflow(tmp_path / "theirs", content)
    assert_reads(tmp_path / "theirs", content)


def test_a_block_of_the_index_is_the_one_tensorflow_writes(tmp_path):
    content = {n: a for n, a in many(60).items() if a.size}
    write_streamed(tmp_path / "ours", content)
    save_by_tensorflow(tmp_path / "theirs", content)
    ours, theirs = (index_path(tmp_path / n).read_bytes() for n in ("ours", "theirs"))
    restarts = struct.pack("<I", 3) + b"\0"  # Of 46 entries; a checksum follows.
    end = theirs.index(restarts) + len(restarts) + 4
    assert ours[:end] == theirs[:end]


def test_reads_a_bundle_of_several_data_files(tmp_path):
    parts = [many(200, seed) for seed in range(3)]
    for i, part in enumerate(parts):
        save_by_tensorflow(tmp_path / f"part{i}", part)
    merge(tmp_path, 3)
    content = parts[0] | parts[1] | parts[2]
    assert_reads(tmp_path / "m", content)
    source = BundleSource(tmp_path / "m")
    assert source.files == [
        index_path(tmp_path / "m"),
        *(data_path(tmp_path / "m", i, 3) for i in range(3)),
    ]
    source.close()
    data_path(tmp_path / "m", 1, 3).unlink()
    assert "m.data-00001-of-00003: cannot be opened: No such file" in refusal(tmp_path / "m")


def merge(folder: Path, count: int) -> None:
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(folder / f"part{i}") for i in range(count)],
        destination_prefix=str(folder / "m"),
        delete_old_dirs=False,
    )


def test_never_overwrites_an_index_or_a_data_file(tmp_path):
    for path in (index_path(tmp_path / "a"), data_path(tmp_path / "b")):
        path.write_bytes(b"mine")
        with pytest.raises(FileFault, match="File exists"):
            write_bundle(tmp_path / path.name[0], {"w": np.ones(1)})
        assert path.read_bytes() == b"mine"


# Damage.


def refusal(prefix: Path) -> str:
    descriptors = open_descriptors()
    with pytest.raises(FileFault) as e:
        BundleSource(prefix)
    assert e.value.message.startswith(f"{prefix}.")
    assert e.value.message.isprintable()
    assert len(e.value.message) < 1000
    assert open_descriptors() == descriptors
    return e.value.message


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def state(prefix: Path) -> dict[str, tuple[Entry, bytes]]:
    source = BundleSource(prefix)
    found = {n: (e, read_tensor(source, n).tobytes()) for n, e in source.entries.items()}
    source.close()
    return found


def state_or_fault(prefix: Path) -> tuple[dict[str, tuple[Entry, bytes]], FileFault | None]:
    try:
        return state(prefix), None
    except FileFault as e:
        return {}, e


SAMPLE = {
    "h/0/bias": np.arange(3, dtype=np.float32),
    "h/0/kernel": np.arange(6, dtype=np.float16).reshape(2, 3),
    "step": np.array(7),
}


@pytest.fixture(params=["ours", "theirs"])
def sample(request, tmp_path) -> Path:
    prefix = tmp_path / "m"
    (write_bundle if request.param == "ours" else save_by_tensorflow)(prefix, SAMPLE)
    return prefix


def test_any_changed_bit_of_the_index_is_refused_or_means_nothing(sample):
    index = index_path(sample)
    whole, before = index.read_bytes(), state(sample)
    unnoticed = set()
    with index.open("r+b", buffering=0) as file:
        for at in range(len(whole)):
            for mask in (1, 2, 4, 8, 16, 32, 64, 128, 255):
                os.pwrite(file.fileno(), bytes([whole[at] ^ mask]), at)
                after, fault = state_or_fault(sample)
                if fault:
                    assert fault.message.startswith(f"{index}: ")
                else:
                    assert after == before
                    unnoticed.add(at)
            os.pwrite(file.fileno(), whole[at : at + 1], at)
    # Only the unused metadata block, and the padding and that block's handle in the footer.
    meta = range(len(whole) - 48 - 64, len(whole) - 8)
    assert unnoticed <= set(meta)
    assert len(unnoticed) < 56


@pytest.mark.parametrize("which", [index_path, data_path])
def test_a_file_cut_anywhere_is_refused_by_name(sample, which):
    path = which(sample)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert refusal(sample).startswith(f"{path}: ")
    path.unlink()
    assert f"{path}: cannot be opened: No such file" in refusal(sample)


def test_a_short_data_file_names_tensor_and_place(sample):
    os.truncate(data_path(sample), 31)
    assert "has 31 bytes, tensor 'step' needs bytes 24 to 32" in refusal(sample)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>404</html>", "HTML page"),
    ],
)
@pytest.mark.parametrize("which", [index_path, data_path])
def test_files_that_are_no_bundle_are_named(sample, which, content, expected):
    which(sample).write_bytes(content)
    assert expected in refusal(sample)


# Indices with valid checksums and hostile content.


def varint(n: int) -> bytes:
    out = bytearray()
    n &= 2**64 - 1  # Negative numbers have ten bytes in protocol buffers.
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


@cache
def dimension(n: int) -> bytes:
    return field(2, field(1, n))


def entry(
    *shape: int, dtype: int = 1, size: int = 8, shard: int = 0, offset: int = 0, extra: bytes = b""
) -> bytes:
    dims = b"".join(map(dimension, shape))
    fields = field(1, dtype) + field(2, dims) + field(3, shard) + field(4, offset)
    return fields + field(5, size) + b"\x35" + bytes(4) + extra


HEADER = field(1, 1) + field(3, field(1, 1))


def block(pairs: Iterable[tuple[bytes, bytes]], restarts: bytes | None = None) -> bytes:
    out = bytearray()
    for key, value in pairs:
        out += b"\0" + varint(len(key)) + varint(len(value)) + key + value
    return bytes(out) + (struct.pack("<II", 0, 1) if restarts is None else restarts)


def stored(content: bytes, kind: int = 0) -> bytes:
    content += bytes([kind])
    return content + struct.pack("<I", masked(crc32c(content)))


def handle(begin: int, content: bytes) -> bytes:
    return varint(begin) + varint(len(content))


def table(*blocks: bytes, kind: int = 0, order: Iterable[int] | None = None) -> bytes:
    """Return a table of data blocks; `order` gives their numbers in the index, with repetitions."""
    out, handles = b"", []
    for content in blocks:
        handles.append(handle(len(out), content))
        out += stored(content, kind)
    listed = range(len(blocks)) if order is None else order
    index = block((b"k%09d" % n, handles[i]) for n, i in enumerate(listed))
    footer = (handle(0, blocks[0]) + handle(len(out), index)).ljust(40, b"\0")
    return out + stored(index) + footer + struct.pack("<Q", 0xDB4775248B80FB57)


def index_of(*entries: bytes, header: bytes = HEADER) -> bytes:
    pairs = [(b"", header), *((b"w%06d" % i, e) for i, e in enumerate(entries))]
    return table(block(pairs))


def keyed(*keys: bytes) -> bytes:
    return table(block([(b"", HEADER), *((k, entry(2)) for k in keys)]))


def shared_prefixes(length: int, count: int) -> bytes:
    """Return a table of names with `length` bytes that share all but six with the name before."""
    out = bytearray(block([(b"", HEADER), (b"x" * (length - 6) + b"000000", entry(2))], b""))
    before, after = varint(length - 6) + b"\6" + varint(len(entry(2))), entry(2)
    for n in range(1, count):
        out += before + b"%06d" % n + after
    return table(bytes(out) + struct.pack("<II", 0, 1))


WHOLE = index_of(entry(2))
EMPTY = block([], bytes(4))
FULL_OF_RESTARTS = block([], bytes(MIB) + struct.pack("<I", MIB // 4))

HOSTILE: dict[str, tuple[bytes, str]] = {
    "47 bytes": (WHOLE[-47:], "has 47 bytes, expected 48 to"),
    "above the cap": (bytes(MAX_INDEX_BYTES) + WHOLE, "expected 48 to"),
    "not a table": (bytes(100), "its last 8 bytes are not the table's magic number"),
    "no blocks": (table(EMPTY, order=[]), "does not begin with the bundle's header"),
    "no header": (table(block([(b"w", entry(2))])), "does not begin with the bundle's header"),
    "0 shards": (index_of(entry(2), header=b""), "names 0 data files"),
    "10^9 shards": (index_of(entry(2), header=field(1, 10**9)), "names 1000000000 data files"),
    "-1 shards": (index_of(entry(2), header=field(1, -1)), f"names {2**64 - 1} data files"),
    "shards as bytes": (index_of(header=field(1, b"1")), "bytes where a number belongs"),
    "big-endian": (index_of(entry(2), header=HEADER + field(2, 1)), "are big-endian"),
    "shard out of range": (index_of(entry(2, shard=1)), "is in data file 1, but there are 1"),
    "shard -1": (index_of(entry(2, shard=-1)), f"is in data file {2**64 - 1}, but there are 1"),
    "dtype 0": (index_of(entry(2, dtype=0)), "has dtype 0, expected one of"),
    "strings": (index_of(entry(2, dtype=7)), "has dtype 7, expected one of"),
    "a reference": (index_of(entry(2, dtype=101)), "has dtype 101, expected one of"),
    "size -1": (index_of(entry(-1)), "has a negative size"),
    "sizes -1 and -2": (index_of(entry(-1, -2)), "has a negative size"),
    "size 2^62": (index_of(entry(2**62)), f"shape [{2**62}] overflows"),
    "product 2^64": (index_of(entry(2**32, 2**32, size=0)), "overflows"),
    "product 2^124, and 0": (index_of(entry(2**62, 2**62, 0, size=0)), "overflows"),
    "shape beyond the data": (index_of(entry(2**40, size=2**42)), "tensor 'w000000' needs bytes 0"),
    "9 dimensions": (index_of(entry(*[1] * 9)), "more than 8 dimensions"),
    "a million dimensions": (index_of(entry(*[1] * 10**6)), "more than 8 dimensions"),
    "shape as a number": (index_of(field(1, 1) + field(2, 2)), "a number where bytes belong"),
    "dimension as a number": (index_of(field(2, field(2, 2))), "a number where bytes belong"),
    "size as bytes": (index_of(field(2, field(2, field(1, b"")))), "bytes where a number belongs"),
    "bytes that do not fit": (index_of(entry(2, size=9)), "of float32 [2] claims 9 bytes"),
    "bytes -8": (index_of(entry(2, size=-8)), f"claims {2**64 - 8} bytes"),
    "offset beyond the data": (index_of(entry(2, offset=1)), "needs bytes 1 to 9"),
    "offset 2^63-8": (index_of(entry(2, offset=2**63 - 8)), f"needs bytes {2**63 - 8} to {2**63}"),
    "offset -8": (index_of(entry(2, offset=-8)), f"begins at byte {2**64 - 8}"),
    "slices": (index_of(entry(2, extra=field(7, b""))), "is stored in slices"),
    "checksum of 8 bytes": (
        index_of(entry(2, extra=b"\x31" + bytes(8))),
        "where a number of 4 bytes belongs",
    ),
    "checksum as a number": (index_of(entry(2, extra=field(6, 1))), "number of 4 bytes belongs"),
    "group": (index_of(entry(2, extra=b"\x0b")), "has wire type 3"),
    "field 0": (index_of(entry(2, extra=field(0, 1))), "a field of number 0"),
    "field cut": (index_of(entry(2)[:-1]), "a message's field is cut short"),
    "number cut": (index_of(entry(2, extra=b"\x08")), "a number is cut short"),
    "number of 11 bytes": (index_of(entry(2, extra=b"\x08" + b"\xff" * 11)), "more than 64 bits"),
    "field of 2^60 bytes": (index_of(b"\x12" + varint(2**60)), "a message's field is cut short"),
    "name twice": (keyed(b"w", b"w"), "not in order, or one occurs twice"),
    "names not in order": (keyed(b"w", b"v"), "not in order, or one occurs twice"),
    "header twice": (keyed(b""), "not in order, or one occurs twice"),
    "not UTF-8": (keyed(b"\xff"), "a tensor's name is not UTF-8"),
    "surrogate": (keyed(b"\xed\xa0\x80"), "a tensor's name is not UTF-8"),
    "long name": (keyed(b"x" * 1025), "a name has 1025 bytes, expected at most 1024"),
    "long names of few bytes": (shared_prefixes(MIB, 20_000), "expected at most 1024"),
    "many names of few bytes": (
        shared_prefixes(1024, 20_000),
        f"names more than {MAX_TENSORS} tensors",
    ),
    "more tensors than any": (
        index_of(*[field(1, 4) + field(5, 1)] * (MAX_TENSORS + 1)),
        f"names more than {MAX_TENSORS} tensors",
    ),
    "compressed": (table(block([(b"", HEADER)]), kind=1), "at byte 0 is compressed"),
    "empty block": (table(b""), "shorter than its restart count"),
    "10^9 restarts": (
        table(block([(b"", HEADER)], struct.pack("<I", 10**9))),
        "claims 1000000000 restarts",
    ),
    "shared without a name": (table(b"\1\0\0" + bytes(4)), "reaches beyond its block"),
    "value beyond the block": (table(b"\0\0\x7f" + bytes(4)), "reaches beyond its block"),
    "a block again and again": (
        table(block([(b"", HEADER)]), FULL_OF_RESTARTS, order=[0, *[1] * 100_000]),
        "begins inside the one before it",
    ),
    "blocks not in order": (
        table(block([(b"w", entry(2))]), block([(b"", HEADER)]), order=[1, 0]),
        "begins inside the one before it",
    ),
    "block beyond the end": (
        table(block([(b"", varint(10**6) + varint(9))]))[:-48] + WHOLE[-48:],
        "index is corrupt",
    ),
}


@pytest.fixture
def frozen():
    """Keep the garbage collector from visiting objects of other test modules."""
    gc.freeze()
    yield
    gc.unfreeze()


def bundle(prefix: Path, index: bytes) -> Path:
    index_path(prefix).write_bytes(index)
    data_path(prefix).write_bytes(bytes(8))
    return prefix


def test_harmless_crafted_indices_are_read(tmp_path):
    assert list(state(bundle(tmp_path / "m", keyed(b"a", b"b")))) == ["a", "b"]
    assert len(state(bundle(tmp_path / "m", shared_prefixes(1024, 1000)))) == 1000
    blocks = block([(b"", HEADER)]), block([(b"a", entry(2))]), block([(b"b", entry(2))])
    assert list(state(bundle(tmp_path / "m", table(*blocks)))) == ["a", "b"]


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_hostile_indices_fast_and_small(tmp_path, case):
    index, expected = HOSTILE[case]
    prefix = bundle(tmp_path / "m", index)
    begin = time.process_time()
    assert expected in refusal(prefix)
    assert time.process_time() - begin < 2
    tracemalloc.start()
    try:
        refusal(prefix)
        assert tracemalloc.get_traced_memory()[1] < MIB + 64 * len(index)
    finally:
        tracemalloc.stop()


def test_damaged_indices_are_read_or_refused(tmp_path):
    """Damage the content before the checksums are computed, so that they do not catch it."""
    rng = random.Random(5)
    whole = block([(b"", HEADER), (b"w", entry(2)), (b"x", entry(1, 1, dtype=2))])
    prefix, read = bundle(tmp_path / "m", table(whole)), 0
    assert len(state(prefix)) == 2
    for _ in range(2000):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(changed))
            match rng.randrange(4):
                case 0:
                    changed[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
                case 1:
                    changed[at] ^= 1 << rng.randrange(8)
                case 2:
                    changed[at:at] = rng.randbytes(rng.randint(1, 4))
                case 3:
                    del changed[at : at + rng.randint(1, 4)]
        index_path(prefix).write_bytes(table(bytes(changed)))
        found, fault = state_or_fault(prefix)
        if fault:
            assert fault.message.startswith(f"{prefix}.")
            assert fault.message.isprintable()
        else:
            assert all(len(data) <= 8 for _, data in found.values())
            read += 1
    assert 20 < read < 1500
