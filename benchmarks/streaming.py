"""Time and memory of `gptj train --execution streaming` beside the resident run with recomputation.

    python benchmarks/streaming.py WORK_FOLDER [--layers 2] [--vocabulary 8192] [--steps 3]
        [--length 2048] [--only streaming …]

Blocks of the true 6B's width with random weights, one sequence a step, AdamW in float32. Each way
is a process of its own, one after the other, and takes the same batches; losses must agree. The
vocabulary is small where the resident run has to fit too, and the true one (50400) to measure the
memory of streaming. The least time of a step after the first counts, which compiles. Prints the
table of docs/benchmarks.md, and beside it what the machine's disk and multiplications do, and the
time of a step that follows from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

GPTJ = (sys.executable, "-m", "runner.cli.root")
NOT_BY_NORM = ("--set", "optimizer.max_gradient_norm=0")
WAYS: dict[str, tuple[str, ...]] = {
    "resident, recompute": ("--set", "model.recompute=true"),
    "streaming": ("--execution", "streaming"),
    "streaming, not clipped by norm": ("--execution", "streaming", *NOT_BY_NORM),
    "streaming, LoRA": ("--execution", "streaming", "--set", "model.lora.rank=8"),
}
#: Relative, between losses of two ways at one step.
TOLERANCE = 1e-3


def write_records(folder: Path, length: int, vocabulary: int, count: int) -> None:
    """Sequences of random tokens as TFRecords."""
    import tensorflow as tf

    folder.mkdir()
    random = np.random.default_rng(0)
    with tf.io.TFRecordWriter(str(folder / "data.tfrecord")) as writer:
        for _ in range(count):
            ids = random.zipf(1.2, length + 1) % vocabulary
            lists = {
                "input_ids": ids[:-1],
                "input_mask": np.ones(length, int),
                "labels": ids[1:],
            }
            lists = {k: tf.train.Int64List(value=v) for k, v in lists.items()}
            feature = {k: tf.train.Feature(int64_list=v) for k, v in lists.items()}
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())


def prepare(folder: Path, layers: int, vocabulary: int) -> Path:
    """The weights as a bundle, which streaming reads as it is."""
    weights = folder / f"weights-{layers}-{vocabulary}"
    if not weights.exists():
        hf = folder / "hf"
        sizes = ("--set", f"n_layer={layers}", "--set", f"vocab_size={vocabulary}")
        ends = ("--set", "bos_token_id=0", "--set", "eos_token_id=0") if vocabulary < 50257 else ()
        new = (*GPTJ, "new", "--preset", "6b", *sizes, *ends, "--dtype", "float16", "--quiet")
        subprocess.run([*new, "--out", hf], check=True)
        convert = (*GPTJ, "convert", hf, "--to", "tf", "--out", weights, "--quiet")
        subprocess.run(convert, check=True)
        shutil.rmtree(hf)
    return weights


def command(folder: Path, weights: Path, length: int, steps: int, way: str) -> list[Any]:
    """What is run, but for its --dry-run."""
    settings = {
        "train_input.data_dir": folder / f"records-{weights.name}-{length}",
        "train_input.max_sequence_length": length,
        "train_input.batch_size": 1,
        "train_input.shuffle": "false",
        "runconfig.log_step_count_steps": 1,
        "runconfig.keep_checkpoint_max": 1,
        "runconfig.save_checkpoints_steps": 10**6,
    }
    sets = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    run = ("--model-dir", folder / "model_dir", "--max-steps", steps)
    return [*GPTJ, "train", "--init-from", weights, *run, *sets, *WAYS[way]]


def train(arguments: list[Any], folder: Path) -> list[dict[str, float]]:
    """The metrics of every step."""
    shutil.rmtree(folder / "model_dir", ignore_errors=True)
    subprocess.run([*map(str, arguments), "--quiet"], check=True)
    lines = (folder / "model_dir/metrics.jsonl").read_text().splitlines()
    shutil.rmtree(folder / "model_dir")
    return [json.loads(line) for line in lines]


def main() -> None:
    """Make weights and records, run every way, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=WAYS, nargs="+", default=list(WAYS))
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    weights = prepare(folder, options.layers, options.vocabulary)
    records = folder / f"records-{weights.name}-{options.length}"
    if not records.exists():
        write_records(records, options.length, options.vocabulary, options.steps)
    print("| | seconds a step | ratio | tokens/s | memory | planned |\n" + "| --- " * 6 + "|")
    base: float | None = None
    losses: list[list[float]] = []
    for way in options.only:
        arguments = command(folder, weights, options.length, options.steps, way)
        planned = json.loads(
            subprocess.run(
                [*map(str, arguments), "--dry-run", "--json"], check=True, capture_output=True
            ).stdout
        )
        rows = train(arguments, folder)
        losses.append([row["loss"] for row in rows])
        seconds = min(row["seconds_per_step"] for row in rows[1:])
        base = base or seconds
        memory = max(row["peak_rss_bytes"] for row in rows)
        print(
            f"| {way} | {seconds:.1f} | {seconds / base:.2f} | {options.length / seconds:.1f} | "
            f"{memory / 1e9:.2f} GB | {planned['seconds_per_step']:.1f} s, "
            f"{planned['planned_rss_bytes'] / 1e9:.2f} GB, "
            f"{planned['read_bytes'] / 1e9:.1f} + {planned['written_bytes'] / 1e9:.1f} GB moved |",
            flush=True,
        )
    # Only the first step of LoRA is that of the others.
    np.testing.assert_allclose([x[0] for x in losses], losses[0][0], rtol=TOLERANCE)


if __name__ == "__main__":
    main()
