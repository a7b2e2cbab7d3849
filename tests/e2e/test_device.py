"""A device with its own memory: blocks are copied to it in turn, everything else stays.

TensorFlow can make two devices of one processor; the second stands for a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from tests.cli.test_train import MEASURED

#: Runs the program, and prints where the weights were when blocks had been loaded.
WITH_TWO = """
import sys
from runner.cli.shared import framework
framework.prepare()
import tensorflow as tf
processor, one = tf.config.list_physical_devices("CPU")[0], tf.config.LogicalDeviceConfiguration()
tf.config.set_logical_device_configuration(processor, [one, one])
from gptj_model.streaming.training import StreamedTraining
from runner.cli.root import main
found, load = set(), StreamedTraining.load
def watched(self, weights):
    load(self, weights)
    found.update(weight.value.device for weight in self._weights)
StreamedTraining.load = watched
code = main()
print(*sorted(found), file=sys.stderr)
sys.exit(code)
"""
TRAIN = ("train", "--init-from", "hf", "--params", "params.yaml", "--max-steps", "2", "--quiet",
         "--execution", "streaming")  # fmt: skip


def _rows(folder: str) -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in MEASURED} for x in lines]


@pytest.mark.parametrize(
    "more",
    [(), pytest.param(("--set", "model.lora.rank=4"), marks=pytest.mark.full)],
    ids=["all", "adapter"],
)
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_blocks_are_trained_on_a_device_of_its_own(golden_run: Path, more, gptj):
    assert gptj(*TRAIN, *more, "--model-dir", "here").code == 0
    there = ("--set", "runconfig.device=/cpu:1", "--model-dir", "there")
    command = [sys.executable, "-c", WITH_TWO, *TRAIN, *more, *there]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [d.rpartition("/")[2] for d in done.stderr.splitlines()[-1].split()] == ["device:CPU:1"]
    assert _rows("there") == _rows("here")


@pytest.mark.parametrize("device", ["/gpu:0", "/cpu:7", "nonsense"])
@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_missing_device_is_refused(golden_run: Path, device: str, gptj):
    if device == "/gpu:0" and tf.config.list_physical_devices("GPU"):
        pytest.skip("there is one")
    done = gptj(*TRAIN, "--set", f"runconfig.device={device}")
    assert done.code == 2
    assert device in done.stderr
    assert "CPU:0" in done.stderr
    assert not list(Path("model_dir").glob("*ckpt*"))
