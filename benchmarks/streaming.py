"""Time and memory of `gptj train --execution streaming` beside the resident run with recomputation,
and what the disk and the multiplications of the machine allow.

    python benchmarks/streaming.py WORK_FOLDER [--layers 2] [--vocabulary 8192] [--rounds 4]
        [--length 2048] [--only streaming …]
    python benchmarks/streaming.py WORK_FOLDER --memory [--layers 4] [--tokens 8]

Blocks of the true 6B's width with random weights, one sequence per step, AdamW in float32. Each
execution is a process of its own that holds its model from its first to its last step, on the same
batches; losses must agree. They take steps in turn: a waiting process is stopped, background
threads included. The vocabulary is small where the resident run must fit too, and the true one
(50400) to measure the memory of streaming. The median of the steps counts, without the first, which
compiles.

The second table is the roofline: operations and bytes of a step, by --dry-run, at the best rates
measured between the rounds, and the number of tokens per step from which on the bytes are hidden.

With --memory: streamed `gptj generate` with none, some and all blocks kept in memory, beside what
reading the others allows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from side import Side

from gptj_convert.resources import footprint
from gptj_convert.resources.rates import Rates, measure
from gptj_model.config import GPTJConfig
from gptj_model.streaming.residency import Residency

GPTJ = (sys.executable, "-m", "runner.cli.root")
STREAMING = {"runconfig.execution": "streaming"}
#: Each way's settings; the first one that is run is what the others are compared with.
WAYS: dict[str, dict[str, Any]] = {
    "resident, recompute": {"model.recompute": True},
    "resident": {},
    "streaming": STREAMING,
    "streaming, not clipped by norm": {**STREAMING, "optimizer.max_gradient_norm": 0},
    "streaming, LoRA": {**STREAMING, "model.lora.rank": 8},
}
DEFAULT = ("resident, recompute", "streaming")
PROMPT = range(1, 17)
#: Relative, between losses of two ways at one step.
TOLERANCE = 1e-3


def write_records(folder: Path, length: int, vocabulary: int, count: int) -> None:
    """Write sequences of random tokens as TFRecords."""
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


def prepare(folder: Path, layers: int, vocabulary: int, dtype: str = "float32") -> Path:
    """Write the weights as a bundle, which streaming reads as it is."""
    weights = folder / f"weights-{layers}-{vocabulary}-{dtype}"
    if not weights.exists():
        hf = folder / "hf"
        sizes = ("--set", f"n_layer={layers}", "--set", f"vocab_size={vocabulary}")
        ends = ("--set", "bos_token_id=0", "--set", "eos_token_id=0") if vocabulary < 50257 else ()
        new = (*GPTJ, "new", "--preset", "6b", *sizes, *ends, "--dtype", "float16", "--quiet")
        subprocess.run([*new, "--out", hf], check=True)
        convert = (*GPTJ, "convert", hf, "--to", "tf", "--dtype", dtype, "--out", weights)
        subprocess.run([*convert, "--quiet"], check=True)
        shutil.rmtree(hf)
    return weights


def settings(records: Path, length: int, way: str) -> dict[str, Any]:
    """Return what an execution changes of the params.yaml beside the weights."""
    return {
        "train_input.data_dir": str(records),
        "train_input.max_sequence_length": length,
        "train_input.batch_size": 1,
        "train_input.shuffle": False,
        "runconfig.log_step_count_steps": 1,
        "runconfig.keep_checkpoint_max": 1,
        "runconfig.save_checkpoints_steps": 10**6,
        **WAYS[way],
    }


def serve(folder: Path, weights: Path, way: str, values: dict[str, Any]) -> None:
    """Be one execution: print a line after each step, and wait for one before the next."""
    from runner.cli.shared import framework

    framework.prepare()
    from gptj_convert.resources import machine
    from runner.config.params_file import load_params
    from runner.training.run.events import StepDone
    from runner.training.train import Run, train

    params = load_params(weights / "params.yaml", values)
    model_dir = folder / f"model_dir-{list(WAYS).index(way)}"
    shutil.rmtree(model_dir, ignore_errors=True)
    sys.stdin.readline()
    with Run(params, model_dir, init_from=weights) as run:
        for event in train(run, 10**6, stopped=lambda: False):
            if isinstance(event, StepDone):
                memory = (machine.peak_rss() or 0) / 1e9
                figures = {"loss": event.loss, "cpu": time.process_time(), "memory": memory}
                print(json.dumps(figures), flush=True)
                sys.stdin.readline()


class Way:
    """One execution in a process of its own, which runs only during its turn."""

    def __init__(self, folder: Path, weights: Path, way: str, values: dict[str, Any]) -> None:
        self._model_dir = folder / f"model_dir-{list(WAYS).index(way)}"
        self._arguments = (folder, weights, way, json.dumps(values))
        self._side: Side | None = None
        self._busy = 0.0

    def step(self) -> dict[str, float]:
        """Return loss, elapsed and CPU seconds and peak resident GB of the next step."""
        begun = time.perf_counter()
        if self._side is None:
            self._side = Side(__file__, "--side", *self._arguments)
        else:
            os.kill(self._side.process.pid, signal.SIGCONT)
        answer = self._side.ask()
        os.kill(self._side.process.pid, signal.SIGSTOP)
        figures = {**answer, "seconds": time.perf_counter() - begun}
        figures["cpu"], self._busy = figures["cpu"] - self._busy, figures["cpu"]
        return figures

    def stop(self) -> None:
        """End the process, and remove what it has written."""
        if self._side:
            self._side.stop()
        shutil.rmtree(self._model_dir, ignore_errors=True)


def planned(weights: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return what --dry-run prints."""
    words = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    command = (*GPTJ, "train", "--init-from", weights, "--dry-run", "--json", *words)
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def race(folder: Path, options: argparse.Namespace) -> None:
    """Run all executions in turn and print both tables."""
    weights = prepare(folder, options.layers, options.vocabulary)
    records = folder / f"records-{options.vocabulary}-{options.length}"
    if not records.exists():
        write_records(records, options.length, options.vocabulary, 64)
    values = {way: settings(records, options.length, way) for way in options.only}
    sides = {way: Way(folder, weights, way, values[way]) for way in options.only}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in sides}
    rates: list[Rates] = []
    try:
        for _ in range(options.rounds + 1):
            for way, side in sides.items():
                found[way].append(side.step())
            rates.append(measure(folder))
    finally:
        for side in sides.values():
            side.stop()
    plans = {way: planned(weights, values[way]) for way in sides}
    print("| | seconds a step | planned | ratio | CPU | ratio | tokens/s | memory | planned |")
    print("| --- " * 9 + "|")
    base: dict[str, float] = {}
    for way, steps in found.items():
        seconds, cpu = (statistics.median(s[k] for s in steps[1:]) for k in ("seconds", "cpu"))
        base = base or {"seconds": seconds, "cpu": cpu}
        print(
            f"| {way} | {seconds:.1f} | {plans[way]['seconds_per_step']:.1f} | "
            f"{seconds / base['seconds']:.2f} | {cpu:.1f} s | "
            f"{cpu / base['cpu']:.2f} | {options.length / seconds:.1f} | "
            f"{steps[-1]['memory']:.2f} GB | {plans[way]['planned_rss_bytes'] / 1e9:.2f} GB |"
        )
    best = _best(rates)
    # What a step reaches, the machine can do.
    reached = (plans[w]["flops"] / min(x["seconds"] for x in s[1:]) for w, s in found.items())
    multiplication = max(best.multiplication, *reached)
    show_roofline(plans, replace(best, multiplication=multiplication), options.length)
    # Only the first step of LoRA, which changes other weights, is that of the others.
    losses = [steps[0]["loss"] for steps in found.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=TOLERANCE)


def _best(rates: list[Rates]) -> Rates:
    """Return the best rates: other work can only have slowed a measurement."""
    return Rates(**{f.name: max(getattr(r, f.name) for r in rates) for f in fields(Rates)})


def show_roofline(plans: dict[str, dict[str, Any]], rates: Rates, tokens: int) -> None:
    """Print what each execution must compute and move, and the least time of it."""
    print(
        f"\nMultiplications {rates.multiplication / 1e12:.3f} TFLOP/s, disk {rates.read / 1e9:.2f} "
        f"GB/s read and {rates.write / 1e9:.2f} GB/s written, around the page cache.\n"
    )
    print("| | computed | at that rate | read + written | at that rate | bound by | hidden from |")
    print("| --- " * 7 + "|")
    for way, plan in plans.items():
        computing = plan["flops"] / rates.multiplication
        moving = plan["read_bytes"] / rates.read + plan["written_bytes"] / rates.write
        print(
            f"| {way} | {plan['flops'] / 1e12:.2f} TFLOP | {computing:.1f} s | "
            f"{plan['read_bytes'] / 1e9:.1f} + {plan['written_bytes'] / 1e9:.1f} GB | "
            f"{moving:.1f} s | {'computing' if computing >= moving else 'the disk'} | "
            f"{tokens * moving / computing:,.0f} tokens |"
        )


def generate(folder: Path, options: argparse.Namespace) -> None:
    """Print tokens per second with none, half and all blocks kept, against reading the others."""
    weights = prepare(folder, options.layers, options.vocabulary, "float16")
    config = GPTJConfig.from_file(weights / "config.json")
    length = len(PROMPT) + 1 + options.tokens
    states = footprint.cache_bytes(config, 1, length)
    needed = partial(
        footprint.streamed_memory,
        config,
        stored="float16",
        batch=1,
        length=length,
        states=states,
    )
    embedding = config.vocab_size * config.n_embd
    block = (footprint.parameters(config) - 2 * embedding) // config.n_layer
    base = ("generate", "--model", weights, "--ids", ",".join(map(str, PROMPT)), "--json")
    print("| kept | tokens/s | the disk allows | of it | peak | planned |\n" + "| --- " * 6 + "|")
    for count in (0, config.n_layer // 2, config.n_layer):
        planned = needed(kept=Residency(blocks=count, head=count > 0))
        seconds: list[float] = []
        for tokens in (1, 1 + options.tokens):
            command = [*GPTJ, *base, "--max-new-tokens", tokens, "--memory", planned]
            begun = time.perf_counter()
            done = subprocess.run(list(map(str, command)), check=True, capture_output=True)
            seconds.append(time.perf_counter() - begun)
        made = json.loads(done.stdout)
        rate = (len(made["ids"]) - len(PROMPT) - 1) / (seconds[1] - seconds[0])
        read = 2 * ((config.n_layer - made["kept_blocks"]) * block)
        read += 0 if made["kept_head"] else 2 * embedding
        allowed = measure(folder).read / read if read else None
        bound = f"{allowed:.2f} | {rate / allowed:.2f}" if allowed else "all | "
        print(
            f"| {made['kept_blocks']} of {config.n_layer} blocks | {rate:.2f} | {bound} | "
            f"{made['peak_rss_bytes'] / 1e9:.2f} GB | {planned / 1e9:.2f} GB |",
            flush=True,
        )


def main() -> None:
    """Prepare, run, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", choices=WAYS, nargs="+", default=list(DEFAULT))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        folder, weights, way, values = options.side
        serve(Path(folder), Path(weights), way, json.loads(values))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    (generate if options.memory else race)(options.folder, options)


if __name__ == "__main__":
    main()
