"""Readers of damaged files: they return a result or raise a typed fault, and nothing else.

Every mutant is made from a valid file and a seed. Its number is in the assertion, so that a failure
can be reproduced. `make test-full` runs twenty times as many.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptj_convert.checkpoint.open import open_checkpoint
from gptj_convert.conversion.execute import execute
from gptj_convert.conversion.plan import make_plan
from gptj_convert.conversion.source_card import read_card
from gptj_convert.formats.containers.hdf5 import Hdf5Source
from gptj_convert.formats.containers.safetensors import SafetensorsSource
from gptj_convert.formats.containers.sharded import ShardedSource
from gptj_convert.formats.containers.tensor_bundle import BundleSource
from gptj_convert.formats.containers.torch_checkpoint import TorchCheckpointSource
from gptj_convert.inspection.signature import read_statement
from gptj_convert.settings.params_yaml import read_yaml
from gptj_model.config import GPTJConfig
from gptj_model.errors import FileFault, GptjError
from gptj_model.source import TensorSource, read_tensor
from gptj_model.tensors import Scheme
from runner.config.params_file import load_params
from runner.data.reading.records import read_records
from tests.conftest import GOLDEN_RUNS, make_checkpoint

#: Time limit per file, in seconds.
LIMIT = 10

NUMBERS = [b"-1", b"0", b"1e999", b"NaN", b"null", b"9" * 40, b"1.5", b"true", b'""', b"[]", b"{}"]
WORDS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


def mutant(data: bytes, rng: random.Random, hot: int) -> bytes:
    """Return data with one to four changes, mostly among the first or last `hot` bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        edge = min(hot, len(changed))
        at = rng.randrange(edge)
        if rng.random() < 0.4:
            at = len(changed) - edge + at
        match rng.randrange(8):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.randrange(256)
            case 2:
                del changed[at : at + rng.choice([1, 2, 8, 100])]
            case 3:
                changed[at:at] = rng.randbytes(rng.choice([1, 2, 8, 100]))
            case 4:
                del changed[at:]
            case 5:
                word = rng.choice(WORDS).to_bytes(8, "little")[: rng.choice([1, 2, 4, 8])]
                changed[at : at + len(word)] = word
            case 6:
                length = rng.choice([8, 40, 200])
                changed[at:at] = changed[at : at + length]
            case 7:
                digits = [i for i in range(edge) if 48 <= changed[i] <= 57]
                if digits:
                    i = rng.choice(digits)
                    changed[i : i + 1] = rng.choice(NUMBERS)
    return bytes(changed)


@contextmanager
def limited() -> Iterator[None]:
    """Raise an error instead of hanging."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read_all(source: TensorSource) -> None:
    """Read every tensor in the header, whose size the file bounds."""
    try:
        for name in source.tensors:
            read_tensor(source, name)
    finally:
        source.close()


class Reader:
    """Reader, a valid file for it, and the size of the structure at either end, in bytes."""

    def __init__(self, file: Path, read: Callable[[Path], object], hot: int = 4000) -> None:
        self.file = file
        self.read = read
        self.hot = hot


def read_params(path: Path) -> None:
    read_yaml(path)
    load_params(path, {})


def read_metadata(path: Path) -> None:
    if fault := read_card(path.parent).fault:
        raise FileFault(fault)


def read_signed(path: Path) -> None:
    """Read a statement as the payload of a signature."""
    payload = base64.b64encode(path.read_bytes()).decode()
    signature = path.with_suffix(".sig")
    signature.write_text(json.dumps({"dsseEnvelope": {"payload": payload}}))
    read_statement(signature)


CARD = """---
language: [en, "no"]
license: apache-2.0
tags: &tags
- causal-lm
datasets: *tags
model-index:
- name: small
  results: [{task: {type: text-generation}, metrics: [{type: accuracy, value: 0.5}]}]
---
# A model
"""
STATEMENT = {
    "predicateType": "https://model_signing/signature/v1.0",
    "subject": [{"name": "m", "digest": {"sha256": "0" * 64}}],
    "predicate": {
        "resources": [
            {"name": name, "algorithm": "sha256", "digest": "a" * 64} for name in ("a", "b/c")
        ],
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [".git", "model.sig"],
        },
    },
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    folder = tmp_path_factory.mktemp("seeds")
    hf = make_checkpoint(folder / "hf", n_layer=1, vocab_size=20, n_embd=8, rotary_dim=2, n_head=2)
    state = load_file(hf / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    views = {n: v.t().contiguous().t() if v.dim() == 2 else v for n, v in state.items()}
    views["columns"] = torch.rand(6, 20)[:, 3:11]
    torch.save(views, folder / "views.bin")
    sharded = folder / "sharded"
    sharded.mkdir()
    names = sorted(state)
    shards = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for file, inside in shards.items():
        torch.save({n: state[n] for n in inside}, sharded / file)
    weight_map = {n: file for file, inside in shards.items() for n in inside}
    total = sum(v.nbytes for v in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (sharded / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for scheme in (Scheme.TF, Scheme.KERAS):
        with open_checkpoint(hf) as checkpoint:
            plan = make_plan(checkpoint, scheme, "keep")
            for _ in execute(plan, checkpoint, folder / scheme.value):
                pass
    record, params = folder / "a.tfrecord", folder / "params.yaml"
    shutil.copyfile(next((GOLDEN_RUNS / "adamw").rglob("*.tfrecord*")), record)
    shutil.copyfile(GOLDEN_RUNS / "adamw/params.yaml", params)
    card, statement = folder / "card/README.md", folder / "statement.json"
    card.parent.mkdir()
    card.write_text(CARD)
    statement.write_text(json.dumps(STATEMENT))
    return {
        "safetensors": Reader(hf / "model.safetensors", lambda p: read_all(SafetensorsSource(p))),
        "bin": Reader(
            folder / "pytorch_model.bin", lambda p: read_all(TorchCheckpointSource(p)), 6000
        ),
        "views": Reader(folder / "views.bin", lambda p: read_all(TorchCheckpointSource(p)), 6000),
        "index.json": Reader(
            sharded / "pytorch_model.bin.index.json", lambda p: read_all(ShardedSource(p))
        ),
        "config.json": Reader(hf / "config.json", GPTJConfig.from_file),
        "params.yaml": Reader(params, read_params),
        "bundle": Reader(
            folder / "tf/tf_model.ckpt.index", lambda p: read_all(BundleSource(p.with_suffix("")))
        ),
        "model card": Reader(card, read_metadata),
        "signature": Reader(statement, read_signed),
        "tfrecord": Reader(record, lambda p: list(read_records(p, max_bytes=1 << 20)), 1000),
        "hdf5": Reader(folder / "keras/model.weights.h5", lambda p: read_all(Hdf5Source(p)), 9000),
    }


KINDS = (
    *("safetensors", "bin", "index.json", "config.json", "params.yaml", "bundle", "tfrecord"),
    *("hdf5", "views", "model card", "signature"),
)


def feed(reader: Reader, count: int, seed: int = 0) -> int:
    """Read mutants, and return how many were refused."""
    data = reader.file.read_bytes()
    refused = longest = 0
    try:
        reader.read(reader.file)  # the seed is valid
        for n in range(count):
            reader.file.write_bytes(mutant(data, random.Random(f"{seed} {n}"), reader.hot))
            try:
                with limited():
                    reader.read(reader.file)
            except GptjError as e:
                refused += 1
                longest = max(longest, len(e.message))
            except BaseException as e:
                raise AssertionError(f"mutant {n}: {type(e).__name__}: {e}") from e
    finally:
        reader.file.write_bytes(data)
    assert longest < 20_000
    return refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutants(kind: str, readers: dict[str, Reader]):
    assert feed(readers[kind], 1000) > 100


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_thousand_mutants(kind: str, readers: dict[str, Reader]):
    assert feed(readers[kind], 20_000, seed=1) > 2000


def test_an_untyped_error_fails_the_test(readers: dict[str, Reader]):
    """The harness itself can fail, here with a reader that has a bug."""

    def careless(path: Path) -> None:
        length = int.from_bytes(path.read_bytes()[:8], "little")
        json.loads(path.read_bytes()[8 : 8 + length])

    with pytest.raises(AssertionError, match="mutant"):
        feed(Reader(readers["safetensors"].file, careless), 100)


def test_no_other_file_is_opened(readers: dict[str, Reader], tmp_path: Path):
    """No file that a mutant names is opened outside the folder of the valid files."""
    root = str(readers["index.json"].file.parent)
    opened: set[str] = set()
    watching = True

    def hook(event: str, arguments: tuple) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | bytes):
            opened.add(str(arguments[0]))

    sys.addaudithook(hook)
    feed(readers["index.json"], 300, seed=2)
    watching = False
    assert opened
    assert all(path.startswith(root) for path in opened), opened


def test_seeds_are_repeatable():
    data = np.arange(1000, dtype=np.uint16).tobytes()
    assert mutant(data, random.Random("0 1"), 100) == mutant(data, random.Random("0 1"), 100)
