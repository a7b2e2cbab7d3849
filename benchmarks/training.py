"""Speed and memory of `gptj train` beside transformers' GPT-J in PyTorch, in one run.

    python benchmarks/training.py WORK_FOLDER [--shapes 2x256 8x1024] [--rounds 3] [--bfloat16]
        [--layers 12] [--recompute]

Both start from the same weights (768 wide, 12 blocks, 162 million), take the same batches and make
the same update: AdamW in float32 with the gradient norm clipped to 1. Ours is the loop of `gptj
train`, from records to metrics.jsonl; the peer is the model as `from_pretrained` gives it, with
`torch.optim.AdamW(fused=True)`, batches in memory. Two processes take steps in turn, so that other
work on the machine affects both; the least time of a step counts. With --bfloat16 both compute in
bfloat16 with float32 weights: `mixed_bfloat16` and `torch.autocast`. Losses of all steps must
agree. Prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from side import Side

GPTJ = (sys.executable, "-m", "runner.cli.root")
VOCABULARY = 50400
RATE = 1e-5
#: Relative, between losses of the two sides at one step.
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-2}


def batch(step: int, shape: tuple[int, int]) -> np.ndarray:
    """Ids and labels of a step, int64 (2, B, T): the ids are the labels of those before."""
    B, T = shape
    ids = np.random.default_rng(step).zipf(1.2, (B, T + 1)) % VOCABULARY
    return np.stack((ids[:, :-1], ids[:, 1:]))


def write_records(path: Path, shape: tuple[int, int], steps: int) -> None:
    """Write the batches of all steps as TFRecords."""
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(path)) as writer:
        for ids, labels in (
            row for n in range(steps) for row in zip(*batch(n, shape), strict=True)
        ):
            features = {"input_ids": ids, "input_mask": np.ones_like(ids), "labels": labels}
            lists = {k: tf.train.Int64List(value=v) for k, v in features.items()}
            feature = {k: tf.train.Feature(int64_list=v) for k, v in lists.items()}
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())


def ours(folder: Path, shape: tuple[int, int], dtype: str, recompute: bool) -> Iterator[float]:
    """Yield the losses of steps of the loop that `gptj train` runs."""
    from runner.cli.shared import framework

    framework.prepare()
    from runner.config.params_file import validate
    from runner.training.run.events import StepDone
    from runner.training.train import Run, train

    config = json.loads((folder / "hf/config.json").read_text())
    B, T = shape
    values: dict[str, Any] = {
        "train_input": {
            "data_dir": str(folder / f"records-{B}x{T}"), "vocab_size": VOCABULARY, "batch_size": B,
            "max_sequence_length": T, "shuffle": False,
        },
        "model": {
            "hidden_size": config["n_embd"], "num_heads": config["n_head"],
            "num_hidden_layers": config["n_layer"], "rotary_dim": config["rotary_dim"],
            "max_position_embeddings": config["n_positions"], "share_embedding_weights": False,
            "layer_norm_epsilon": config["layer_norm_epsilon"], "recompute": recompute,
            "mixed_precision": dtype == "bfloat16", "mixed_precision_dtype": "bfloat16",
        },
        "optimizer": {
            "optimizer_type": "adamw", "learning_rate": RATE, "epsilon": 1e-8,
            "max_gradient_norm": 1.0, "use_bias_correction": True,
        },
        "runconfig": {"save_checkpoints_steps": 10**9, "log_step_count_steps": 1},
    }  # fmt: skip
    params = validate(values, {}, where="benchmark")
    run = Run(params, folder / f"model_dir-{os.getpid()}", init_from=folder / "hf")
    for event in train(run, 10**9, stopped=lambda: False):
        if isinstance(event, StepDone):
            yield event.loss


def peer(folder: Path, shape: tuple[int, int], dtype: str, recompute: bool) -> Iterator[float]:
    """Yield the losses of steps of transformers' model in PyTorch."""
    import torch
    from transformers import GPTJForCausalLM

    model = GPTJForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    model.train()
    if recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    step = 0
    while True:
        ids, labels = torch.from_numpy(batch(step, shape))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            found = model(ids, labels=labels, shift_labels=labels, use_cache=False)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield found.loss.item()
        step += 1


SIDES = {"transformers": peer, "gptj": ours}


def serve(name: str, *arguments: Any) -> None:
    """Be one side: read a line, make a step, print a line."""
    from gptj_convert.resources import machine

    steps = SIDES[name](*arguments)
    for _ in sys.stdin:
        begun, busy = time.perf_counter(), time.process_time()
        loss = next(steps)
        figures = {
            "loss": loss,
            "seconds": time.perf_counter() - begun,
            "cpu": time.process_time() - busy,
            "memory": (machine.peak_rss() or 0) / 1e9,
        }
        print(json.dumps(figures), flush=True)


def race(folder: Path, shape: tuple[int, int], options: argparse.Namespace) -> None:
    """Run both sides in turns and print their rows."""
    B, T = shape
    dtype = "bfloat16" if options.bfloat16 else "float32"
    records = folder / f"records-{B}x{T}"
    if not records.exists():
        records.mkdir()
        write_records(records / "data.tfrecord", shape, 64)
    sides = {
        name: Side(__file__, "--side", name, folder, B, T, dtype, int(options.recompute))
        for name in SIDES
        if options.only in (None, name)
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(options.rounds + 1):
        for name, side in sides.items():
            found[name].append(side.ask())
    for side in sides.values():
        side.stop()
    losses = [[f["loss"] for f in steps] for steps in found.values()]
    np.testing.assert_allclose(losses[0], losses[-1], rtol=TOLERANCE[dtype])
    base = None
    for name, steps in found.items():
        # The first compiles, and takes memory for the first time.
        seconds = min(f["seconds"] for f in steps[1:])
        base = base or seconds
        print(
            f"| {B} × {T} {dtype} | {name} | {B * T / seconds:,.0f} | {base / seconds:.2f} | "
            f"{min(f['cpu'] for f in steps[1:]):.1f} s | {steps[-1]['memory']:.2f} GB |",
            flush=True,
        )


def main() -> None:
    """Prepare both sides, run the races and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shapes", nargs="+", default=["2x256", "8x1024"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--side", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        name, folder, B, T, dtype, recompute = options.side
        serve(name, Path(folder), (int(B), int(T)), dtype, recompute == "1")
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "hf").exists():
        new = (*GPTJ, "new", "--preset", "125m", "--set", f"n_layer={options.layers}")
        subprocess.run([*new, "--out", options.folder / "hf", "--quiet"], check=True)
    print("| batch | | tokens/s | ratio | CPU | memory |\n| --- | --- | --- | --- | --- | --- |")
    for text in options.shapes:
        B, T = map(int, text.split("x"))
        race(options.folder, (B, T), options)


if __name__ == "__main__":
    main()
