"""Time and memory of `gptj convert` beside `cp` of the bytes it writes, in one run.

    python benchmarks/conversion.py WORK_FOLDER [--layers 28] [--rounds 3] [--with-transformers]

Makes a random checkpoint of the 6B's width in float16 (12.1 GB at 28 layers) and needs 20 times
that on disk: a run's checkpoint with the optimizer state has six times its size. The peer and the
conversion take turns; the fastest run of each counts. `cp` is followed by fsync, as the conversion
is. Prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import mmap
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from gptj_convert.formats.containers.tensor_bundle import BundleSource, write_tensors
from gptj_convert.formats.layouts.tf import state_text
from gptj_model.source import read_tensor
from gptj_model.tensors import GLOBAL_STEP, SLOTS, slot_name

GPTJ = (sys.executable, "-m", "runner.cli.root")
PIECE = 16 * 2**20

TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model.save_pretrained(sys.argv[2], max_shard_size="100GB")
"""


def timed(*command: object) -> tuple[float, float]:
    """Return seconds and peak resident GB of a command and its children."""
    begun = time.monotonic()
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.monotonic() - begun, usage.ru_maxrss * 1024 / 1e9


def copied(folder: Path, to: Path) -> float:
    """Return the seconds to copy a folder's weights with cp, and to sync them."""
    to.mkdir()
    weights = [p for p in folder.iterdir() if p.stat().st_size > 2**20]
    copies = [to / p.name for p in weights]
    begun = time.monotonic()
    subprocess.run(["cp", *weights, to], check=True)
    subprocess.run(["sync", *copies], check=True)
    seconds = time.monotonic() - begun
    shutil.rmtree(to)
    return seconds


def device_rates(path: Path, size: int) -> tuple[float, float]:
    """Return GB/s of writing and reading, bypassing the page cache, with one stream."""
    memory = mmap.mmap(-1, PIECE)
    rates = []
    for flags in (os.O_WRONLY | os.O_CREAT, os.O_RDONLY):
        fd = os.open(path, flags | os.O_DIRECT, 0o644)
        begun = time.monotonic()
        for offset in range(0, size, PIECE):
            if flags == os.O_RDONLY:
                os.preadv(fd, [memory], offset)
            else:
                os.pwrite(fd, memory, offset)
        os.fsync(fd)
        rates.append(size / (time.monotonic() - begun) / 1e9)
        os.close(fd)
    path.unlink()
    return rates[0], rates[1]


def race(source: Path, out: Path, rounds: int, *options: str) -> tuple[float, float, float, int]:
    """Return the least seconds of convert and of cp, peak memory in GB, and bytes of the result."""
    ours, copies, memory, size = [], [], 0.0, 0
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        seconds, peak = timed(*GPTJ, "convert", source, "--out", out, "--quiet", *options)
        ours.append(seconds)
        memory = max(memory, peak)
        size = sum(p.stat().st_size for p in out.iterdir())
        os.sync()
        copies.append(copied(out, out.with_name("copy")))
    return min(ours), min(copies), memory, size


def run_of(converted: Path) -> Path:
    """Write a run's checkpoint after a step, with the weights as their own moments."""
    run = converted.with_name("run")
    run.mkdir()
    source = BundleSource(converted / "tf_model.ckpt")
    infos, reads = {}, {}
    for name, info in source.tensors.items():
        slots = [] if name == GLOBAL_STEP else [slot_name(name, slot) for slot in SLOTS["adamw"]]
        infos |= dict.fromkeys([name, *slots], info)
        reads |= dict.fromkeys([name, *slots], name)
    write_tensors(run / "model.ckpt-0", infos, lambda name: read_tensor(source, reads[name]))
    (run / "checkpoint").write_text(state_text(["model.ckpt-0"]))
    for name in ("config.json", "params.yaml"):
        shutil.copy(converted / name, run)
    return run


def write_gapped(transposed: Path, out: Path) -> None:
    """The same weights as columns of wider storages, none of whose rows is one range.

    q, k and v are parts of one fused projection, as what splits such a weight saves them; the
    feed-forward weights lie in storages of 64 columns more.
    """
    import torch

    state = torch.load(transposed / "pytorch_model.bin", weights_only=True, mmap=True)
    for name in [n for n in state if n.endswith("q_proj.weight")]:
        names = [name.replace("q_proj", f"{p}_proj") for p in "qkv"]
        fused = torch.cat([state[n].t() for n in names], dim=1)
        for n, part in zip(names, fused.chunk(3, dim=1), strict=True):
            state[n] = part.t()
    for name in [n for n in state if ".fc_" in n and n.endswith(".weight")]:
        rows, columns = state[name].shape
        storage = torch.zeros(columns, rows + 64, dtype=state[name].dtype)
        storage[:, :rows] = state[name].t()
        state[name] = storage[:, :rows].t()
    out.mkdir()
    torch.save(state, out / "pytorch_model.bin")
    shutil.copy(transposed / "config.json", out)


def main() -> None:
    """Run the races and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--with-transformers", action="store_true")
    parser.add_argument("--only-bin", action="store_true", help="the rows of .bin files alone")
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    source, float32 = folder / "source", folder / "float32"
    new = ("new", "--preset", "6b", "--set", f"n_layer={options.layers}", "--dtype", "float16")
    if not source.exists() and not options.only_bin:
        timed(*GPTJ, *new, "--out", source, "--quiet")
    written, read = device_rates(folder / "rate", 4 * 2**30)
    print(f"Layers: {options.layers}. Device: {written:.1f} GB/s writing, {read:.1f} reading.\n")
    print("| | result | gptj | cp | ratio | memory |\n| --- | --- | --- | --- | --- | --- |")

    def row(name: str, *arguments: str, of: Path = source, out: Path = folder / "out") -> None:
        ours, copy, memory, size = race(of, out, options.rounds, *arguments)
        print(
            f"| {name} | {size / 1e9:.1f} GB | {ours:.1f} s | {copy:.1f} s | "
            f"{ours / copy:.2f} | {memory:.2f} GB |",
            flush=True,
        )

    transposed, gapped = folder / "transposed", folder / "gapped"
    timed(*GPTJ, *new, "--file-format", "bin", "--layout", "transposed", "--out", transposed)
    row("transposed .bin float16 → TF float32", "--to", "tf", of=transposed)
    row("transposed .bin float16 → TF float16", "--to", "tf", "--dtype", "keep", of=transposed)
    row("transposed .bin float16 → HF float16", "--to", "hf", of=transposed)
    with ProcessPoolExecutor(1) as other:
        other.submit(write_gapped, transposed, gapped).result()
    shutil.rmtree(transposed)
    row(".bin of column views, float16 → TF float32", "--to", "tf", of=gapped)
    row(".bin of column views, float16 → TF float16", "--to", "tf", "--dtype", "keep", of=gapped)
    shutil.rmtree(gapped)
    if options.only_bin:
        shutil.rmtree(folder)
        return
    row("HF float16 → TF float32", "--to", "tf", out=float32)
    row("HF float16 → TF float16", "--to", "tf", "--dtype", "keep")
    row("HF float16 → CS float16", "--to", "cs")
    row("HF float16 → HF float16, 2 GB shards", "--to", "hf", "--max-shard-size", "2GB")
    if options.with_transformers:
        shutil.rmtree(folder / "out", ignore_errors=True)
        seconds, peak = timed(sys.executable, "-c", TRANSFORMERS, source, folder / "out")
        print(f"| transformers, load and save in float16 | | {seconds:.1f} s | | | {peak:.1f} GB |")
    shutil.rmtree(source)  # there may be no room for all at once
    row("TF float32 → HF float32", "--to", "hf", of=float32)
    with ProcessPoolExecutor(1) as other:  # whose memory is not counted as that of what follows
        run = other.submit(run_of, float32).result()
    shutil.rmtree(float32)
    row("TF run with AdamW's state → CS", "--to", "cs", "--optimizer-state", of=run)
    row("TF run with AdamW's state → HF", "--to", "hf", "--optimizer-state", of=run)
    shutil.rmtree(folder)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
