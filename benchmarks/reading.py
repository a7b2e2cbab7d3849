"""Rate at which records are read, beside what a 125m model consumes while it trains.

    python benchmarks/reading.py WORK_FOLDER [--batch 8] [--rounds 3] [--steps 3]

The records hold 2,048 tokens of random text each, in four files, and are in the page cache. The
peer is the plain way: `tf.data` with each record parsed by itself, then batched. The model trains
with `gptj train`, one sequence per step; its rate is that of metrics.jsonl. Prints the table of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf

from gptj_convert.conversion.random_checkpoint import write_random_checkpoint
from gptj_convert.settings.params_yaml import PARAMS_FILE
from gptj_convert.settings.pretraining import continued_pretraining
from gptj_model.config import GPTJConfig
from runner.config.params import InputParams
from runner.data.reading.example import FEATURES
from runner.data.reading.input_fn import ALL_ROWS, batches
from runner.data.reading.place import place_after
from runner.data.reading.records import RecordWriter

LENGTH, FILES, EXAMPLES = 2048, 4, 1024
GPTJ = (sys.executable, "-m", "runner.cli.root")


def write(folder: Path, *, compress: bool = False) -> Path:
    """Write records of random tokens."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    random = np.random.default_rng(0)
    for n in range(FILES):
        text = random.integers(0, 50257, (EXAMPLES, LENGTH + 1), np.int32)
        block = np.stack([text[:, :-1], np.ones((EXAMPLES, LENGTH), np.int32), text[:, 1:]], axis=1)
        writer = RecordWriter(folder / f"{n}.tfrecord", compress=compress)
        writer.write(block)
        writer.close()
    return folder


def ours(folder: Path, batch: int, *, rows: slice = ALL_ROWS, skip: int = 0) -> Iterable:
    """Read as a training run does: one epoch, or from a given batch on."""
    params = InputParams(
        data_dir=[str(folder)], max_sequence_length=LENGTH, batch_size=batch, repeat=skip > 0
    )
    start = place_after(params, skip)
    return batches(params, vocab_size=50400, training=True, rows=rows, start=start)


def plain(folder: Path, batch: int) -> Iterable:
    """Read with the usual few lines of tf.data."""
    spec = {name: tf.io.FixedLenFeature([LENGTH], tf.int64) for name in FEATURES}
    files = tf.data.Dataset.list_files(f"{folder}/*.tfrecord", shuffle=False)
    records = files.interleave(tf.data.TFRecordDataset, cycle_length=4).shuffle(10 * batch)
    parsed = records.map(lambda raw: tf.io.parse_single_example(raw, spec))
    return parsed.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def rate(found: Iterable, batch: int) -> float:
    """Return tokens per second over all batches, including the time to the first one."""
    begun = time.monotonic()
    count = sum(1 for _ in found)
    return count * batch * LENGTH / (time.monotonic() - begun)


def consumption(folder: Path, records: Path, steps: int) -> float:
    """Return tokens per second of a 125m model that trains."""
    config = GPTJConfig.preset("125m")
    shutil.rmtree(folder, ignore_errors=True)
    for _ in write_random_checkpoint(config, folder / "hf", seed=1, dtype="float32"):
        pass
    (folder / PARAMS_FILE).write_text(json.dumps(continued_pretraining(config)))
    changed = {
        "train_input.data_dir": records,
        "train_input.batch_size": 1,
        "train_input.max_sequence_length": LENGTH,
        "runconfig.log_step_count_steps": 1,
    }
    command = [*GPTJ, "train", "--init-from", folder / "hf", "--params", folder / PARAMS_FILE]
    command += ["--model-dir", folder / "run", "--max-steps", steps, "--quiet"]
    command += [f"--set={key}={value}" for key, value in changed.items()]
    subprocess.run([*map(str, command)], check=True)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    # The first step compiles.
    return max(json.loads(line)["tokens_per_second"] for line in lines[1:])


def main() -> None:
    """Run the races and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    folder, batch = options.folder, options.batch
    folder.mkdir(parents=True, exist_ok=True)
    records = write(folder / "records")
    packed = write(folder / "packed", compress=True)
    model = consumption(folder / "125m", records, options.steps)
    readers = {
        "tf.data, the plain way": lambda: plain(records, batch),
        "input_fn": lambda: ours(records, batch),
        "input_fn, gzip": lambda: ours(packed, batch),
        "input_fn, one of 2 workers": lambda: ours(records, batch, rows=slice(0, None, 2)),
    }
    best = dict.fromkeys(readers, 0.0)
    for _ in range(options.rounds):
        for name, make in readers.items():
            best[name] = max(best[name], rate(make(), batch))
    print("| | tokens/s | × what the 125m model consumes |\n| --- | --- | --- |")
    print(f"| training the 125m model | {model:,.0f} | 1 |")
    for name, found in best.items():
        print(f"| {name} | {found:,.0f} | {found / model:,.0f} |")
    begun = time.monotonic()
    next(iter(ours(records, batch, skip=10**7)))
    print(f"\nTo batch 10,000,000, in epoch {10**7 * batch // (FILES * EXAMPLES):,}: "
          f"{time.monotonic() - begun:.2f} s.")  # fmt: skip


if __name__ == "__main__":
    main()
