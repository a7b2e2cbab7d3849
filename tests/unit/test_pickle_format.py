"""`pytorch_model.bin`: files of torch.save are read bit for bit, anything else is refused."""

from __future__ import annotations

import builtins
import collections
import functools
import importlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptj_convert.formats.containers import torch_pickle
from gptj_convert.formats.containers.torch_checkpoint import TorchCheckpointSource
from gptj_model.errors import FileFault
from gptj_model.source import TensorInfo, read_rows, read_tensor

ROOT = Path(__file__).resolve().parents[2]

PROTO = b"\x80\x02"
STOP = b"."
HOOKS = b"ccollections\nOrderedDict\n)R"


def string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(n: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", n)


def numbers(*ns: int) -> bytes:
    return b"(" + b"".join(map(number, ns)) + b"t"


def storage(key: str = "0", numel: int = 12, kind: str = "Float") -> bytes:
    fields = string("storage") + f"ctorch\n{kind}Storage\n".encode() + string(key)
    return b"(" + fields + string("cpu") + number(numel) + b"tQ"


def tensor(
    shape: bytes = numbers(3, 4),
    strides: bytes = numbers(4, 1),
    offset: bytes = number(0),
    of: bytes | None = None,
) -> bytes:
    arguments = (of or storage()) + offset + shape + strides + b"\x89" + HOOKS
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def state_dict(value: bytes, name: str = "w") -> bytes:
    return PROTO + b"}" + string(name) + value + b"s" + STOP


def archive(
    path: Path,
    data_pkl: bytes,
    extra: Mapping[str, bytes] | None = None,
    folder: str = "archive",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Return a zip archive in the form of torch.save, with a storage "0" of 48 bytes."""
    members = {"data.pkl": data_pkl, "byteorder": b"little", "data/0": bytes(range(48))}
    with zipfile.ZipFile(path, "w", compression) as z, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in (members | dict(extra or {})).items():
            z.writestr(name if name.startswith("!") else f"{folder}/{name}", data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(FileFault) as e:
        TorchCheckpointSource(path)
    assert str(path) in e.value.message
    assert e.value.message.isprintable()
    return e.value.message


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def assert_same(source: TorchCheckpointSource, expected: Mapping[str, torch.Tensor]) -> None:
    assert list(source.tensors) == list(expected)
    for name, want in expected.items():
        got = read_tensor(source, name)
        assert source.tensors[name].shape == tuple(want.shape) == got.shape
        assert source.tensors[name].dtype == str(want.dtype).removeprefix("torch.")
        assert got.tobytes() == want.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


# Files of torch.save.


def crc_faults(source: TorchCheckpointSource) -> list[str]:
    return [fault for _, fault in source.crc_faults() if fault]


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 4), (2, 1, 3, 1), (0,), (3, 0)], ids=str)
def test_reads_every_dtype_bit_for_bit(tmp_path, dtype, shape):
    values = (torch.randn(shape) * 50).to(dtype)
    source = TorchCheckpointSource(save(tmp_path / "m.bin", {"w": values}))
    assert_same(source, {"w": values})
    assert crc_faults(source) == []
    source.close()
    source.close()


def test_keeps_nan_payloads_and_subnormals(tmp_path):
    bits = torch.tensor([0x7FC00001, 0x7F800001, 1, -0x80000000, 0x7F800000], dtype=torch.int32)
    values = bits.view(torch.float32)
    assert_same(TorchCheckpointSource(save(tmp_path / "m.bin", {"w": values})), {"w": values})


def test_reads_parameters_and_module_state_with_metadata(tmp_path):
    class Old(torch.nn.Linear):
        _version = 7

    module = torch.nn.Sequential(Old(3, 4), torch.nn.BatchNorm1d(4), torch.nn.LayerNorm(4))
    state = module.state_dict()
    assert isinstance(state, OrderedDict)
    assert "_metadata" in vars(state)
    assert_same(TorchCheckpointSource(save(tmp_path / "state.bin", state)), state)
    parameters = dict(module.named_parameters())
    assert_same(TorchCheckpointSource(save(tmp_path / "parameters.bin", parameters)), parameters)


def test_reads_views_with_offset_and_tied_tensors(tmp_path):
    base = torch.randn(6, 4)
    state = {
        "all": base,
        "tied": base,
        "tail": base[4:],
        "row": base[2],
        "one_column": base[:, :1][3:4],
        "flat": base.view(2, 12),
        "none": base[6:],
    }
    assert_same(TorchCheckpointSource(save(tmp_path / "m.bin", state)), state)


def test_reads_rows(tmp_path):
    values = torch.randn(7, 3)
    source = TorchCheckpointSource(save(tmp_path / "m.bin", {"w": values}))
    assert np.array_equal(read_rows(source, "w", 2, 5), values[2:5].numpy())


@pytest.mark.parametrize("name", ["", "transformer.wte.weight", "é→💧", "a\nb\x1b[31m", "x" * 1024])
def test_reads_any_name(tmp_path, name):
    state = {name: torch.ones(2)}
    assert_same(TorchCheckpointSource(save(tmp_path / "é m.bin", state)), state)


def test_reads_more_tensors_than_a_byte_counts(tmp_path):
    state = {f"layer.{i}": torch.full((i % 3,), float(i)) for i in range(1500)}
    assert_same(TorchCheckpointSource(save(tmp_path / "m.bin", state)), state)


def test_reads_an_archive_of_more_than_4_gib(tmp_path):
    with torch.serialization.skip_data():  # Leaves a hole in the file: no memory, no disk.
        save(tmp_path / "m.bin", {"big": torch.empty(1_200_000_000), "last": torch.empty(4)})
    source = TorchCheckpointSource(tmp_path / "m.bin")
    assert source.tensors["big"] == TensorInfo("float32", (1_200_000_000,))
    assert not read_rows(source, "big", 1_199_999_990, None).any()
    assert not read_tensor(source, "last").any()


def test_reads_archives_without_the_newer_members(tmp_path):
    path = archive(tmp_path / "m.bin", state_dict(tensor()))
    with zipfile.ZipFile(tmp_path / "old.bin", "w") as z:
        z.writestr("archive/data.pkl", state_dict(tensor()))
        z.writestr("archive/data/0", bytes(range(48)))
        z.writestr("archive/version", b"3\n")
    for p in (path, tmp_path / "old.bin"):
        assert read_tensor(TorchCheckpointSource(p), "w").tobytes() == bytes(range(48))


def test_an_archive_without_checksums_counts_as_unchecked(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path / "m.bin", {"w": torch.ones(4), "empty": torch.ones(0)})
    finally:
        torch.serialization.set_crc32_options(True)
    source = TorchCheckpointSource(tmp_path / "m.bin")
    assert not source.checksummed
    assert crc_faults(source) == []


def test_a_wrong_crc_names_tensor_member_and_both_sums(tmp_path):
    shared = torch.randn(2_000_000)
    state = {"a": torch.ones(9), "b": shared, "c": shared[5:]}
    path = save(tmp_path / "m.bin", state)
    data = bytearray(path.read_bytes())
    source = TorchCheckpointSource(path)
    assert source.checksummed
    member = source._zip.members["data/1"]
    data[member.begin + member.size - 1] ^= 1
    path.write_bytes(data)
    data[source._zip.members["data/0"].begin] ^= 1
    path.write_bytes(data)
    (alone, problem) = crc_faults(TorchCheckpointSource(path))
    assert alone.startswith("'a' (member 'm/data/0'): CRC32 is ")
    assert "'b' and 1 more (member 'm/data/1'): CRC32 is " in problem
    assert f"the archive says {member.crc:08x}" in problem


# Refused values.


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "int"),
        ("text", "str"),
        (None, "NoneType"),
        (1.5, "float"),
        ([torch.ones(1)], "list"),
        ({"w": torch.ones(1)}, "dict"),
        (OrderedDict(), "OrderedDict"),
    ],
)
def test_refuses_entries_that_are_not_tensors(tmp_path, value, kind):
    message = refusal(save(tmp_path / "m.bin", {"w": torch.ones(1), "epoch": value}))
    assert f"entry 'epoch' is of type {kind}" in message


def test_refuses_values_other_than_a_dict_with_text_keys(tmp_path):
    assert "PickledTensor" in refusal(save(tmp_path / "a.bin", torch.ones(2)))
    assert "of type list" in refusal(save(tmp_path / "b.bin", [torch.ones(2)]))
    assert "key is of type int" in refusal(save(tmp_path / "c.bin", {1: torch.ones(2)}))


def test_refuses_views_that_repeat_elements(tmp_path):
    def overlap(value: torch.Tensor) -> str:
        return refusal(save(tmp_path / "m.bin", {"w": value}))

    assert "repeats its elements" in overlap(torch.ones(1).expand(6))
    assert "repeats its elements" in overlap(torch.ones(3, 1).expand(3, 4))
    assert "overlap" in overlap(torch.ones(9).unfold(0, 4, 2))
    assert "overlap" in overlap(torch.ones(40).as_strided((4, 4), (3, 2)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (tensor(strides=numbers(-4, 1)), "strides [-4, 1]"),
        (tensor(shape=numbers(-3, 4)), "shape [-3, 4]"),
        (tensor(offset=number(-1)), "offset -1"),
        (tensor(offset=number(1)), "from offset 1 spans 12 elements, but its storage has only 12"),
        (tensor(offset=number(2**62)), "but its storage has only 12"),
        (tensor(shape=numbers(2**62, 2**62)), "overflows"),
        (tensor(shape=numbers(2**62, 0)), "overflows"),
        (tensor(shape=numbers(3, 5), strides=numbers(4, 1)), "spans 13 elements"),
        (tensor(strides=numbers(1, 1)), "overlap"),
        (tensor(strides=numbers(0, 0)), "repeats its elements"),
        (tensor(strides=numbers(2**62, 1)), f"spans {2**63 + 4} elements"),
        (tensor(strides=numbers(1, 4)), "spans 15 elements"),
        (tensor(strides=numbers(1)), "2 dimensions and 1 strides"),
        (tensor(numbers(*[1] * 9), numbers(*[1] * 9)), "9 dimensions"),
        (tensor(shape=b"\x88\x88\x86"), "not whole numbers"),
        (tensor(shape=b"G" + bytes(8) + b"\x85", strides=numbers(1)), "not whole numbers"),
        (tensor(of=storage(numel=13)), "has 48 bytes, expected 52 (13 of float32)"),
        (tensor(numbers(1), numbers(1), of=storage(numel=11)), "has 48 bytes, expected 44"),
        (tensor(of=storage(kind="Double")), "has 48 bytes, expected 96"),
        (tensor(of=storage(numel=2**62)), f"has 48 bytes, expected {2**64}"),
        (tensor(of=storage(numel=-12)), "storage size -12"),
        (tensor(of=storage(key="7")), "storage '7' is not in the archive"),
        (tensor(of=storage(key="../byteorder")), "is not in the archive"),
        (tensor(of=storage(key="\x1b[2J")), "storage '\\x1b[2J' is not in the archive"),
    ],
)
def test_refuses_claims_that_do_not_fit_the_storage(tmp_path, value, expected):
    message = refusal(archive(tmp_path / "m.bin", state_dict(value)))
    assert "tensor 'w'" in message
    assert expected in message


# Refused programs.


class Call:
    """Object that pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class Plain:
    """Object that pickles as a new object with a state."""

    def __init__(self) -> None:
        self.x = 1


def by_name(module: str, name: str, protocol: bytes = PROTO) -> bytes:
    return protocol + f"c{module}\n{name}\n".encode() + string("touch owned") + b"\x85R" + STOP


TOUCH = "touch owned"
HOSTILE: dict[str, tuple[bytes, str]] = {
    key: (pickle.dumps(value, 2) if not isinstance(value, bytes) else value, expected)
    for key, value, expected in [
        ("os.system", Call(os.system, TOUCH), "posix.system"),
        ("os.system in a dict", {"w": Call(os.system, TOUCH)}, "posix.system"),
        ("os.popen", Call(os.popen, TOUCH), "os.popen"),
        ("subprocess", Call(subprocess.Popen, ["touch", "owned"]), ".Popen"),
        ("eval", Call(builtins.eval, "open('owned', 'w')"), "__builtin__.eval"),
        ("exec", Call(builtins.exec, "open('owned', 'w')"), "__builtin__.exec"),
        ("open", Call(builtins.open, "owned", "w"), "io.open"),
        ("getattr", Call(getattr, "", "upper"), "__builtin__.getattr"),
        ("__import__", Call(__import__, "this"), "__builtin__.__import__"),
        ("import_module", Call(importlib.import_module, "this"), "importlib.import_module"),
        ("partial", functools.partial(os.system, TOUCH), "functools.partial"),
        ("pickle.loads", Call(pickle.loads, pickle.dumps(1)), "pickle.loads"),
        ("numpy array", np.ones(3), "numpy"),
        ("numpy scalar", {"w": np.float32(1)}, "numpy"),
        ("numpy load", Call(np.load, "owned"), "numpy.load"),
        ("torch.load", Call(torch.load, "owned"), "torch.serialization.load"),
        ("torch.hub", by_name("torch.hub", "load"), "torch.hub.load"),
        ("torch v3", by_name("torch._utils", "_rebuild_tensor_v3"), "_rebuild_tensor_v3"),
        ("torch sparse", by_name("torch._utils", "_rebuild_sparse_tensor"), "_rebuild_sparse"),
        ("torch.storage", by_name("torch.storage", "_load_from_bytes"), "_load_from_bytes"),
        ("torch.device", by_name("torch", "device"), "torch.device"),
        ("torch.Size", by_name("torch", "Size"), "torch.Size"),
        ("complex storage", by_name("torch", "ComplexFloatStorage"), "ComplexFloatStorage"),
        ("class", Plain(), "test_pickle_format.Plain"),
        ("set", {"w": {1}}, "__builtin__.set"),
        ("bytes", {"w": b"x"}, "_codecs.encode"),
        ("defaultdict", collections.defaultdict(list), "collections.defaultdict"),
        ("deque", collections.deque([1]), "collections.deque"),
        ("nested name", by_name("torch", "_utils._rebuild_tensor_v2"), "torch._utils._rebuild"),
        ("nested in module", by_name("os.path", "os.system"), "os.path.os.system"),
        ("dotted", by_name("collections", "OrderedDict.fromkeys"), "OrderedDict.fromkeys"),
        ("terminal escape", by_name("o\x1b[2Js", "system"), "'o\\x1b[2Js.system'"),
        ("not UTF-8", PROTO + b"c\xff\xfe\nx\n.", "global"),
        ("name with no end", PROTO + b"c" + b"x" * 5000, "no end"),
        ("call of a storage type", by_name("torch", "FloatStorage"), "StorageType"),
        ("OrderedDict of items", by_name("collections", "OrderedDict"), "arguments of coll"),
        ("tensor of nothing", by_name("torch._utils", "_rebuild_tensor_v2"), "arguments of"),
        ("parameter of text", by_name("torch._utils", "_rebuild_parameter"), "arguments of"),
        ("call of text", PROTO + string("os.system") + string(TOUCH) + b"\x85R.", "calls a str"),
        ("call with a list", PROTO + b"ccollections\nOrderedDict\n]R.", "expected a tuple"),
        ("protocol 0", pickle.dumps({"w": 1}, 0), "expected pickle protocol 2"),
        ("protocol 3", pickle.dumps({"w": 1}, 3), "expected pickle protocol 2"),
        ("protocol 4", pickle.dumps(Call(os.system, TOUCH), 4), "expected pickle protocol 2"),
        ("protocol twice", PROTO + PROTO + b"}.", "PROTO"),
        ("STACK_GLOBAL", PROTO + string("os") + string("system") + b"\x93.", "STACK_GLOBAL"),
        ("INST", PROTO + b"(" + string(TOUCH) + b"ios\nsystem\n.", "INST"),
        ("OBJ", PROTO + b"(" + string(TOUCH) + b"o.", "OBJ"),
        ("NEWOBJ", PROTO + b"ctorch\nFloatStorage\n)\x81.", "NEWOBJ"),
        ("NEWOBJ_EX", PROTO + b"ctorch\nFloatStorage\n)}\x92.", "NEWOBJ_EX"),
        ("EXT1", PROTO + b"\x82\x01.", "EXT1"),
        ("EXT4", PROTO + b"\x84\x01\x00\x00\x00.", "EXT4"),
        ("PERSID", PROTO + b"Pstorage\n.", "PERSID"),
        ("LONG4", PROTO + b"\x8b\xff\xff\xff\x7f.", "LONG4"),
        ("LONG", PROTO + b"L" + b"9" * 9999 + b"L\n.", "LONG"),
        ("BINBYTES8", PROTO + b"\x8e" + b"\xff" * 8 + b".", "BINBYTES8"),
        ("BYTEARRAY8", PROTO + b"\x96" + b"\xff" * 8 + b".", "BYTEARRAY8"),
        ("FRAME", PROTO + b"\x95" + b"\xff" * 8 + b"}.", "FRAME"),
        ("DUP", PROTO + b"}2.", "DUP"),
        ("no such opcode", PROTO + b"\xff.", "b'\\xff'"),
        ("long of 255 bytes", PROTO + b"\x8a\xff" + b"\x7f" * 255 + b".", "a number of 255"),
        ("string of 4 GiB", PROTO + b"X\xff\xff\xff\xffx.", "a string of 4294967295 bytes"),
        ("string cut", PROTO + b"X\xff\x00\x00\x00x.", "ends at byte"),
        ("string not UTF-8", PROTO + b"X\x01\x00\x00\x00\xff.", "not UTF-8"),
        ("lone surrogate", PROTO + string("\ud800") + b".", "not UTF-8"),
        ("marks", PROTO + b"(" * 10_000, "nested marks"),
        ("memo without end", PROTO + b"}" + b"q\x00" * 2**20, "more than 1048576 operations"),
        ("memo of nothing", PROTO + b"q\x00.", "stack, which is empty"),
        ("memo not stored", PROTO + b"h\x07.", "memo 7"),
        ("memo not stored, long", PROTO + b"j\xff\xff\xff\xff.", "memo 4294967295"),
        ("pop of nothing", PROTO + b".", "empty stack"),
        ("pop below a mark", PROTO + b"}(" + b"\x85.", "empty stack"),
        ("tuple without a mark", PROTO + b"t.", "needs a mark"),
        ("set in text", PROTO + string("x") + string("k") + b"Ns.", "in a str"),
        ("odd items", PROTO + b"}(" + string("k") + b"u.", "sets 1 keys"),
        ("tuple as a key", PROTO + b"})Ns.", "key is of type tuple"),
        ("same key twice", PROTO + b"}(" + string("k") + b"N" + string("k") + b"Nu.", "k' twice"),
        ("append to a dict", PROTO + b"}Na.", "appends to a dict"),
        ("two values", PROTO + b"}}.", "more than one value"),
        ("open mark", PROTO + b"}(}.", "more than one value"),
        ("bytes after STOP", PROTO + b"}..", "1 bytes left over"),
        ("no STOP", PROTO + b"}", "ends at byte 3"),
        ("empty", b"", "ends at byte 0"),
        ("BUILD on a dict", PROTO + b"}}b.", "BUILD on a dict"),
        ("BUILD on a tensor", state_dict(tensor() + b"}b"), "BUILD on a PickledTensor"),
        ("BUILD of a class", PROTO + HOOKS + b"}" + string("__class__") + b"Nsb.", "BUILD with"),
        ("BUILD of a tuple", PROTO + HOOKS + b"N}\x86b.", "BUILD with"),
        ("hooks", state_dict(tensor().replace(HOOKS, HOOKS + string("h") + b"Ns")), "arguments"),
        ("persistent text", PROTO + string("storage") + b"Q.", "persistent id"),
        ("persistent module", PROTO + string("module") + b"N\x86Q.", "persistent id"),
        ("storage of a function", PROTO + storage().replace(b"ctorch\nFloatStorage\n",
            b"ccollections\nOrderedDict\n") + b".", "persistent id"),
    ]
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_refuses_programs_by_name_and_place(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, expected = HOSTILE[case]
    message = refusal(archive(tmp_path / "m.bin", data))
    assert expected in message
    assert "data.pkl, byte " in message
    assert [p.name for p in tmp_path.iterdir()] == ["m.bin"]


def test_names_the_byte_of_a_global(tmp_path):
    data = state_dict(b"cos\nsystem\n" + string(TOUCH) + b"\x85R")
    assert f"byte {data.index(b'cos')}: global 'os.system'" in refusal(
        archive(tmp_path / "m.bin", data)
    )


def test_a_tuple_of_tuples_costs_nothing(tmp_path):
    doubled = b"Nq\x00" + b"h\x00h\x00\x86q\x00" * 10_000
    deep = b"N" + b"\x85" * 100_000
    for value in (doubled, deep):
        for data in (
            PROTO + b"}" + value + b"Ns.",
            state_dict(value),
            state_dict(tensor(shape=b"K\x03" + value + b"\x86")),
            PROTO + value + b"Q.",
            PROTO + b"ccollections\nOrderedDict\n" + value + b"R.",
        ):
            refusal(archive(tmp_path / "m.bin", data))


def test_refuses_a_pickle_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("gptj_convert.formats.containers.torch_checkpoint.MAX_PICKLE_BYTES", 100)
    data = state_dict(tensor())
    assert f"has {len(data)} bytes, expected at most 100" in refusal(
        archive(tmp_path / "m.bin", data)
    )
    assert torch_pickle.MAX_PICKLE_BYTES == 16 * 2**20


_AUDIT = """
import codecs, os, sys
from pathlib import Path
from gptj_convert.formats.containers.torch_checkpoint import TorchCheckpointSource
from gptj_model.errors import FileFault
from gptj_model.source import read_tensor

codecs.lookup("cp437")  # zipfile's for names; Python imports codecs when first used.
seen, on = [], False

def hook(event, arguments):
    # The reader checks whether the file is in the page cache.
    looks = event.startswith("mmap.") or event.startswith("ctypes.cdata")
    looks |= event.startswith("ctypes.dl") and arguments[-1] in (None, "mincore")
    if on and not looks and not (event == "open" and arguments[0] == str(path)):
        seen.append((event, arguments))

folder = Path(sys.argv[1])
paths = sorted(folder.iterdir())
sys.addaudithook(hook)
on = True
refused = read = 0
for path in paths:
    try:
        source = TorchCheckpointSource(path)
        for name in source.tensors:
            read_tensor(source, name)
        list(source.crc_faults())
        source.close()
        read += 1
    except FileFault:
        refused += 1
on = False
print(refused, read, seen)
"""


def test_nothing_is_imported_or_run(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for i, (data, _) in enumerate(HOSTILE.values()):
        archive(folder / f"{i}.bin", data)
    save(folder / "good.bin", torch.nn.Linear(2, 3).state_dict())
    done = subprocess.run(
        [sys.executable, "-c", _AUDIT, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.stdout, done.stderr) == (f"{len(HOSTILE)} 1 []\n", "")
    assert not (ROOT / "owned").exists()


def test_the_modules_do_not_load_torch():
    module = "gptj_convert.formats.containers.torch_checkpoint"
    code = f"import {module}, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n"


# Refused archives.


def test_refuses_files_that_are_something_else(tmp_path):
    path = tmp_path / "m.bin"
    for content, expected in [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"\x00\x01\x02\x03" * 40, "expected a PyTorch checkpoint"),
        (b"PK", "expected a PyTorch checkpoint"),
        (b"PK\x03\x04" + bytes(100), "is cut short or not a PyTorch checkpoint: its 104 bytes"),
    ]:
        path.write_bytes(content)
        assert expected in refusal(path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FileFault, match="legacy format") as e:
        TorchCheckpointSource(path)
    assert "weights_only=True" in str(e.value.hint)
    with pytest.raises(FileFault, match="cannot be opened"):
        TorchCheckpointSource(tmp_path / "missing.bin")
    with pytest.raises(FileFault, match="cannot be read"):
        TorchCheckpointSource(tmp_path)


def _good(path: Path, **options: Any) -> Path:
    return archive(path, state_dict(tensor()), **options)


def _duplicate(path: Path) -> None:
    _good(path)
    with zipfile.ZipFile(path, "a") as z, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z.writestr("archive/data/0", bytes(48))


def _patched(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Replace the last occurrence of a byte string."""

    def make(path: Path) -> None:
        before, found, after = _good(path).read_bytes().rpartition(old)
        assert found
        path.write_bytes(before + new + after)

    return make


def _directory_field(name: str, at: int, value: bytes) -> Callable[[Path], None]:
    """Return a function that changes a field of a member's entry in the central directory."""

    def make(path: Path) -> None:
        data = bytearray(_good(path).read_bytes())
        entry = data.rindex(name.encode()) - 46
        assert data[entry : entry + 4] == b"PK\x01\x02"
        data[entry + at : entry + at + len(value)] = value
        path.write_bytes(data)

    return make


def _prefixed(path: Path) -> None:
    content = _good(path).read_bytes()
    path.write_bytes(content[: content.index(b"PK\x01\x02")] + content)


ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deflated": (lambda p: _good(p, compression=zipfile.ZIP_DEFLATED), "is compressed (method 8)"),
    "lzma": (lambda p: _good(p, compression=zipfile.ZIP_LZMA), "is compressed (method 14)"),
    "duplicate": (_duplicate, "'archive/data/0': is in the archive twice"),
    "big-endian": (lambda p: _good(p, extra={"byteorder": b"big"}), "not b'little'"),
    "large byteorder": (lambda p: _good(p, extra={"byteorder": bytes(9999)}), "not b'little'"),
    "two pickles": (lambda p: _good(p, extra={"data/data.pkl": b""}), "2 members named data.pkl"),
    "outside": (lambda p: _good(p, extra={"!/x": b""}), "'!/x' is outside the folder 'archive/'"),
    "deep folder": (lambda p: _good(p, folder="a/b"), "expected exactly one, as FOLDER/data.pkl"),
    "encrypted": (_directory_field("archive/data/0", 8, b"\x01\x00"), "encrypted"),
    "masked": (_directory_field("archive/data/0", 8, b"\x00\x20"), "encrypted"),
    "sizes differ": (_directory_field("archive/data/0", 24, b"\x31"), "in 48 bytes, but its size"),
    "offset": (_directory_field("archive/data/0", 42, b"\x01\x00"), "inside the one before it"),
    "offset beyond": (_directory_field("archive/data/0", 42, b"\xff\xff\xff"), "header at byte"),
    "other name": (_patched(b"archive/data/0", b"archive/data/1"), "its header is not at byte"),
    "no header": (_patched(b"PK\x03\x04", b"PK\x03\x05"), "its header is not at byte"),
    "polyglot": (_prefixed, "expected the first one at 0"),
    "NUL name": (_patched(b"archive/data/0", b"archive/data\x000"), "holds a NUL"),
    "wrong CRC": (_patched(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"), "CRC32 is "),
    "zip64 lies": (_directory_field("archive/data/0", 20, b"\xff" * 8), "ends at byte 4294967"),
    "patched eocd": (_patched(b"PK\x05\x06", b"PK\x05\x07"), "is cut short"),
    "no pickle": (lambda p: zipfile.ZipFile(p, "w").writestr("a/b", b"x"), "0 members"),
    "long name": (lambda p: _good(p, extra={"x" * 3000: b""}), "name has 3008 characters"),
    "large directory": (
        lambda p: _good(p, extra={f"{'x' * 900}{i}": b"" for i in range(1200)}),
        "its zip directory is",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_refuses_archives_that_contradict_themselves(tmp_path, case):
    make, expected = ARCHIVES[case]
    make(tmp_path / "m.bin")
    assert expected in refusal(tmp_path / "m.bin")


def test_a_file_cut_after_opening_names_tensor_and_place(tmp_path):
    path = save(tmp_path / "m.bin", {"w": torch.ones(5000)})
    source = TorchCheckpointSource(path)
    os.truncate(path, 9000)
    with pytest.raises(FileFault, match=r"ends at byte 9000 inside .*, expected \d+ more"):
        read_tensor(source, "w")


# Damage of any kind.


def _reads_or_refuses(path: Path) -> bool:
    """Return whether a file was read completely; no error other than FileFault may occur."""
    try:
        source = TorchCheckpointSource(path)
    except FileFault as e:
        fault = e
    else:
        fault = None
    if fault:
        assert fault.message.isprintable()
        assert len(fault.message) < 8192
        return False
    try:
        total = sum(read_tensor(source, name).nbytes for name in source.tensors)
        crc_faults(source)
        assert total <= len(source.tensors) * path.stat().st_size
    finally:
        source.close()
    return True


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return save(tmp_path_factory.mktemp("sample") / "m.bin", module.state_dict())


def test_a_file_cut_anywhere_is_refused(tmp_path, sample):
    data = sample.read_bytes()
    path = tmp_path / "m.bin"
    for end in {*range(0, len(data), 64), *range(len(data) - 64, len(data))}:
        path.write_bytes(data[:end])
        assert not _reads_or_refuses(path)


_mutations = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
)
_fuzz = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _mutate(data: bytes, mutations: list[tuple[float, int]]) -> bytes:
    changed = bytearray(data)
    for where, value in mutations:
        changed[int(where * len(data))] = value
    return bytes(changed)


@_fuzz
@given(_mutations)
def test_a_damaged_archive_is_read_or_refused(tmp_path, sample, mutations):
    path = tmp_path / "m.bin"
    path.write_bytes(_mutate(sample.read_bytes(), mutations))
    _reads_or_refuses(path)


@_fuzz
@given(_mutations)
def test_a_damaged_pickle_is_read_or_refused(tmp_path, sample, mutations):
    with zipfile.ZipFile(sample) as z:
        data = z.read("m/data.pkl")
        storages = {f"data/{i}": z.read(f"m/data/{i}") for i in range(7)}
    archive(tmp_path / "m.bin", _mutate(data, mutations), storages)
    _reads_or_refuses(tmp_path / "m.bin")


@_fuzz
@given(st.lists(st.sampled_from(sorted(torch_pickle._OPERATIONS)) | st.binary(max_size=4)))
def test_any_program_is_read_or_refused(tmp_path, operations):
    archive(tmp_path / "m.bin", PROTO + b"}" + b"".join(operations) + STOP)
    _reads_or_refuses(tmp_path / "m.bin")


def test_an_untouched_copy_still_reads(tmp_path, sample):
    shutil.copy(sample, tmp_path / "m.bin")
    assert _reads_or_refuses(tmp_path / "m.bin")
