"""Shared fixtures: the program called in this process, and small checkpoints of healthy scale."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptj_convert.conversion.random_checkpoint import write_random_checkpoint
from gptj_convert.resources import rates
from gptj_convert.streams import strips
from gptj_model.config import GPTJConfig
from runner.cli.root import main
from runner.cli.shared import framework
from runner.evaluation.reuse import reuse_programs
from tests.small_model import SMALL

# The modules of five frameworks are millions of objects, and none of them ever becomes garbage.
gc.set_threshold(50_000, 20, 50)

#: Where XLA keeps what it has compiled, for all processes of this session: most of a test of
#: training would be compiling the same step again. TensorFlow reads it first in other processes.
_COMPILED = "GPTJ_TESTS_COMPILED"
if _COMPILED not in os.environ:
    os.environ[_COMPILED] = tempfile.mkdtemp(prefix="gptj-compiled-")
    atexit.register(shutil.rmtree, os.environ[_COMPILED], ignore_errors=True)
    os.environ["TF_XLA_FLAGS"] = (
        f"{os.environ.get('TF_XLA_FLAGS', '')} --tf_xla_persistent_cache_device_types=CPU "
        f"--tf_xla_persistent_cache_directory={os.environ[_COMPILED]}"
    )
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{os.environ[_COMPILED]}/jax"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Small models are compiled for longer than they run: LLVM's optimizations, and the slower one of
# XLA's two ways to write loops, do not pay. `XLA_FLAGS= make test` tests with both.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)

# Tests have no terminal, whatever a runner of several processes says of its width.
os.environ.pop("COLUMNS", None)

GOLDEN_RUNS = Path(__file__).parent / "golden_runs"


def pytest_configure(config: pytest.Config) -> None:
    """Load Keras in processes that run tests; that of `-n` only divides them."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        framework.prepare()


def pytest_collection_finish() -> None:
    """Leave what the modules hold out of every later garbage collection."""
    gc.freeze()


@dataclass(frozen=True)
class Outcome:
    """Outcome of one call of the program."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)


@pytest.fixture(scope="session", autouse=True)
def programs() -> Iterator[None]:
    """Compile the same model once for all runs of this process."""
    with reuse_programs(limit=12):
        yield


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Measure the machine in a moment: no test depends on how fast it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "_SECONDS", 0.01)
        yield


@pytest.fixture
def gptj(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the program in this process: `gptj("convert", path, "--to", "tf")`."""

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = main([str(a) for a in arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Outcome(code, out, err)

    return call


def any_backend(**more: str) -> dict[str, str]:
    """The environment of a process in which Keras may have another backend than here."""
    return {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"} | more


def eight_devices() -> dict[str, str]:
    """The environment of a process in which Keras may have JAX, with eight virtual devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    return any_backend(XLA_FLAGS=flags)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_checkpoint(out: Path, *, seed: int = 7, dtype: str = "float32", **fields: Any) -> Path:
    """A random Hugging Face checkpoint of `SMALL`, with single fields replaced."""
    config = GPTJConfig.preset("tiny", **SMALL | fields)
    for _ in write_random_checkpoint(config, out, seed=seed, dtype=dtype):
        pass
    return out


@pytest.fixture(scope="session")
def small_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint that tests may read but not change."""
    return make_checkpoint(tmp_path_factory.mktemp("small") / "hf")


@pytest.fixture
def hf(small_hf: Path, workdir: Path) -> Path:
    """A copy of the small checkpoint at ./hf, which a test may change."""
    return shutil.copytree(small_hf, workdir / "hf")


@pytest.fixture
def converted(hf: Path, gptj: Callable[..., Outcome]) -> Path:
    """./hf converted to ./converted."""
    assert gptj("convert", hf, "--to", "tf", "--quiet").code == 0
    return Path("converted")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make panels and strips far smaller than tensors, as they are for the true model."""
    monkeypatch.setattr(strips, "PANEL_BYTES", 1000)
    monkeypatch.setattr(strips, "STRIP_BYTES", 5000)


@pytest.fixture
def golden_run(request: pytest.FixtureRequest, workdir: Path) -> Path:
    """The folder of a recorded run, chosen by parameter; it is the current folder."""
    folder = shutil.copytree(GOLDEN_RUNS / request.param, workdir / request.param)
    os.chdir(folder)
    return folder


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a safetensors file with the library."""
    from safetensors.numpy import load_file

    return load_file(path)


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file with the library."""
    from safetensors.numpy import save_file

    arrays = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(arrays, path, metadata={"format": "pt"})


def write_records(path: Path, rows: Iterable[Sequence[Sequence[int]]], **options: Any) -> None:
    """Write a TFRecord file with TensorFlow: ids, mask and labels of each example."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path), **options) as writer:
        for row in rows:
            lists = (tf.train.Int64List(value=[int(v) for v in values]) for values in row)
            pairs = zip(("input_ids", "input_mask", "labels"), lists, strict=True)
            feature = {name: tf.train.Feature(int64_list=values) for name, values in pairs}
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString(deterministic=True))
