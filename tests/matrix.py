"""Outputs of the program for a list of command lines, recorded and compared.

`python tests/matrix.py record FILE` runs every command line in fresh folders and writes exit
codes, key paths and a digest of the numbers in the JSON on stdout, and a digest of every file.
`python tests/matrix.py compare FILE` runs them again and lists what differs from FILE.

The commands run as `python -m runner.cli.root`, so that PYTHONPATH chooses the code. Cases whose
files hold results of floating-point kernels (training, evaluation, adapters) are not portable:
on another CPU the bits of their files may differ, and `--portable` leaves those digests out, as
`tests/matrix.json` does.
Texts for people (stderr, messages, pages) are not recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOLDEN_RUNS = Path(__file__).parent / "golden_runs"
RECORDING = Path(__file__).parent / "matrix.json"

#: Sizes of a model of half a megabyte, with a shape of its own for every axis.
SMALL = [
    word
    for pair in ("vocab_size=211", "n_embd=48", "n_layer=3", "n_head=4", "rotary_dim=6")
    for word in ("--set", pair)
]
#: Fields of metrics.jsonl that the clock or the machine decides.
MEASURED = {
    "tokens_per_second",
    "seconds_per_step",
    "model_flops_utilization",
    "peak_rss_bytes",
    "seconds_left",
    "seconds",
    "planned_rss_bytes",
}
#: Keys of JSON objects that are data: tensors, files, packages.
NAMED_BY_DATA = re.compile(r"[./]|^\d+$")


@dataclass
class Case:
    """One command line, or one change to the folder between two of them.

    Attributes:
        name: unique in the recording.
        arguments: words after `gptj`; `--json` is appended.
        portable: whether the files' bytes are the same on every CPU.
        do: a change to the group's folder, instead of a command line.
        numbers: whether the numbers on stdout are the same in every run.
    """

    name: str
    arguments: Sequence[str] = ()
    portable: bool = True
    do: Callable[[Path], object] | None = None
    numbers: bool = True


@dataclass
class Group:
    """Cases that run in order, in a folder of their own."""

    name: str
    cases: list[Case] = field(default_factory=list)
    slow: bool = False

    def add(self, name: str, line: str | Sequence[str], **options: Any) -> None:
        """Append a case; a line is split at spaces."""
        words = line.split() if isinstance(line, str) else list(line)
        self.cases.append(Case(f"{self.name}: {name}", words, **options))

    def do(self, change: Callable[[Path], object]) -> None:
        """Append a change to the folder."""
        self.cases.append(Case("", do=change))


# Files.


def _copy(source: str, target: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = GOLDEN_RUNS / source
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / target)

    return change


def _text(name: str, content: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)

    return change


def _duplicate(source: str, target: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copytree(folder / source, folder / target)


def _flip(name: str, offset: int) -> Callable[[Path], object]:
    """Invert a byte; a negative offset counts from the end."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[offset] ^= 0xFF
        (folder / name).write_bytes(data)

    return change


def _cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, size)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _set_field(name: str, **fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps(values))

    return change


def _bin_adapter(folder: Path) -> None:
    """Write an adapter of the peft library for the model of 48 × 48 projections, at ./adapter."""
    import numpy as np
    from safetensors.numpy import save_file

    values = np.random.Generator(np.random.PCG64(3))
    tensors = {
        f"base_model.model.transformer.h.{n}.attn.{p}.lora_{letter}.weight": values.standard_normal(
            (2, 48) if letter == "A" else (48, 2), np.float32
        )
        for n in range(3)
        for p in ("q_proj", "v_proj")
        for letter in "AB"
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "fan_in_fan_out": False,
        "base_model_name_or_path": "small",
    }
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))


def _equal_head(folder: Path) -> None:
    """Write ./equal: ./small with a head that equals the embedding."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(folder / "small", folder / "equal")
    path = folder / "equal/model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()
    save_file(tensors, path, metadata={"format": "pt"})


DOCUMENTS = [
    "The quick brown fox.",
    "",
    "naïve 🦜 漢字、かな。\n\ttabs and  spaces",
    "مرحبا 안녕하세요 Привет <|endoftext|> ﷽",
    "line\r\nline\u2028line",
    *(f"document {n} " * (n % 7 + 1) for n in range(40)),
]
PAIRS = [
    ("The quick brown fox jumps over the lazy dog.", "A fox jumps."),
    ("", "no article"),
    ("no abstract", ""),
    ("short", "an abstract that is far longer than its article"),
    ("word " * 60, "too long"),
    ("Café 🦜 opens in the city today, says its owner.", "Café opens 🦜."),
]


TASKS = [
    {"instruction": f"Add {n} and {n}.", "input": "x" * (n % 2), "output": f"{2 * n} 🦜"}
    for n in range(20)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Say {n}. <|endoftext|>"},
            {"role": "assistant", "content": f"It is {n}." * (n % 3)},
        ]
    }
    for n in range(12)
]


def _raw_texts(folder: Path) -> None:
    import gzip

    lines = "".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for n, document in enumerate(DOCUMENTS[:4]):
        (folder / "texts").mkdir(exist_ok=True)
        (folder / f"texts/{n}.txt").write_text(document)
    pairs = "".join(json.dumps({"article": a, "abstract": s}) + "\n" for a, s in PAIRS)
    (folder / "pairs.jsonl").write_text(pairs)
    (folder / "tasks.json").write_text(json.dumps(TASKS, indent=1))
    (folder / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CHATS))
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{"text": 5}\n{"text": "after"}\n')


# The command lines.


def _new() -> Group:
    group = Group("new")
    group.add("small", ["new", "--out", "a", *SMALL])
    group.add("float16", ["new", "--out", "b", "--dtype", "float16", *SMALL])
    group.add("bfloat16", ["new", "--out", "c", "--dtype", "bfloat16", "--seed", "3", *SMALL])
    group.add("shards", ["new", "--out", "d", "--max-shard-size", "200KB", *SMALL])
    group.add("bin", ["new", "--out", "e", "--file-format", "bin", *SMALL])
    group.add(
        "transposed", ["new", "--out", "f", "--file-format", "bin", "--layout", "transposed",
                       "--dtype", "float16", *SMALL]
    )  # fmt: skip
    group.add("tied", ["new", "--out", "g", "--set", "tie_word_embeddings=true", *SMALL])
    group.add("one layer", "new --out h --set n_layer=1 --set n_positions=64")
    group.add("out exists", ["new", "--out", "a", *SMALL])
    group.add("forced", ["new", "--out", "a", "--force", "--seed", "9", *SMALL])
    group.add("unknown field", "new --out z --set nonsense=2")
    group.add("impossible rotary_dim", "new --out z --set rotary_dim=1000")
    group.add("transposed safetensors", "new --out z --layout transposed")
    group.add("unknown preset", "new --out z --preset huge")
    return group


def _convert() -> Group:
    group = Group("convert")
    group.add("source", ["new", "--out", "small", *SMALL])
    group.add("source in float16", ["new", "--out", "half", "--dtype", "float16", *SMALL])
    group.add("tied source", ["new", "--out", "tied", "--set", "tie_word_embeddings=true", *SMALL])
    group.add(
        "transposed source", ["new", "--out", "bin", "--file-format", "bin", "--layout",
                              "transposed", *SMALL]
    )  # fmt: skip
    for to in ("tf", "hf", "keras", "cs"):
        for dtype in ("float32", "float16", "bfloat16", "keep"):
            group.add(
                f"{to} {dtype}", f"convert small --to {to} --dtype {dtype} --out {to}-{dtype}"
            )
        group.add(f"{to} of float16", f"convert half --to {to} --out half-{to}")
        group.add(f"{to} tied", f"convert tied --to {to} --out tied-{to}")
        group.add(f"{to} of .bin", f"convert bin --to {to} --out bin-{to}")
        if to != "hf":
            group.add(f"{to} and back", f"convert {to}-float32 --to hf --out back-{to}")
            group.add(f"{to} tied and back", f"convert tied-{to} --to hf --out back-tied-{to}")
    group.add("tf to cs", "convert tf-float32 --to cs --out tf-to-cs")
    group.add("cs to keras", "convert cs-float32 --to keras --out cs-to-keras")
    group.do(_equal_head)
    for to in ("tf", "hf", "cs", "keras"):
        group.add(f"{to} shared", f"convert equal --to {to} --share-embeddings --out shared-{to}")
    group.add("shards", "convert small --to hf --max-shard-size 200KB --out shards")
    group.add("shards back", "convert shards --to tf --out from-shards")
    group.add("cs for CPU", "convert small --to cs --cs-backend CPU --out cs-cpu")
    group.add("dry run", "convert small --to tf --dry-run --out dry")
    group.add("dry run hf", "convert tf-float32 --to hf --dry-run --out dry")
    group.add("out exists", "convert small --to tf --out tf-float32")
    group.add("forced", "convert half --to tf --out tf-float32 --force")
    group.do(_bin_adapter)
    group.add("adapter", "convert small --to hf --adapter adapter --out adapted", portable=False)
    group.add("verify adapted", "verify adapted --against small --level weights", portable=False)
    group.add("share what differs", "convert small --to tf --share-embeddings --out z")
    group.add("nothing there", "convert nope --to tf")
    group.add("no target", "convert small")
    group.add("unknown target", "convert small --to gguf")
    group.add("drop what the model needs", "convert small --to tf --drop lm_head.bias --out z")
    group.add("drop what is not there", "convert small --to tf --drop v_head.weight --out z")
    group.add("peft of no adapter", "convert small --to peft --out z")
    group.add("optimizer state of none", "convert small --to tf --optimizer-state --out z")
    group.add("shards for tf", "convert small --to tf --max-shard-size 1MB --out z")
    group.add("bad size", "convert small --to hf --max-shard-size huge --out z")
    group.add("resume of nothing", "convert small --to tf --resume --out z")
    group.do(_duplicate("small", "cut"))
    group.do(_cut("cut/model.safetensors", 200_000))
    group.add("cut source", "convert cut --to tf --out z")
    group.do(_duplicate("small", "no-config"))
    group.do(_remove("no-config/config.json"))
    group.add("no config", "convert no-config --to tf --out z")
    group.do(_duplicate("small", "other-config"))
    group.do(_set_field("other-config/config.json", n_layer=4))
    group.add("a layer too few", "convert other-config --to tf --out z")
    group.do(_duplicate("small", "bad-config"))
    group.do(_text("bad-config/config.json", "{"))
    group.add("config is no JSON", "convert bad-config --to tf --out z")
    return group


def _optimizer() -> Group:
    group = Group("optimizer")
    for run in ("adamw", "shared_embedding"):
        group.do(_copy(f"{run}/ckpt", run))
        group.do(_copy(f"{run}/params.yaml", f"{run}/params.yaml"))
        group.do(_copy(f"{run}/hf/config.json", f"{run}/config.json"))
        source = f"{run}/model.ckpt-20"
        for to in ("hf", "cs", "tf"):
            group.add(f"{run} to {to}", f"convert {source} --to {to} --optimizer-state"
                      f" --out {run}-{to}")  # fmt: skip
        group.add(f"{run} by decay", f"convert {source} --to hf --optimizer-state --param-groups"
                  f" decay --out {run}-decay")  # fmt: skip
        group.add(f"{run} hf to tf", f"convert {run}-hf --to tf --optimizer-state --out {run}-1")
        group.add(f"{run} cs to tf", f"convert {run}-cs --to tf --optimizer-state --out {run}-2")
        group.add(f"{run} without", f"convert {source} --to hf --out {run}-3")
    group.do(_copy("cs", "client"))
    group.add("the client's to tf", "convert client/checkpoint_20.mdl --to tf --optimizer-state"
              " --out client-tf")  # fmt: skip
    group.add("to keras", "convert adamw/model.ckpt-20 --to keras --optimizer-state --out z")
    return group


def _verify() -> Group:
    group = Group("verify", slow=True)
    group.add("source", ["new", "--out", "small", *SMALL])
    group.add("converted", "convert small --to tf --out tf")
    group.add("converted in float16", "convert small --to tf --dtype float16 --out tf16")
    group.add("back", "convert tf --to hf --out hf")
    for level in ("structure", "weights"):
        group.add(level, f"verify tf --level {level}")
    group.add("weights in float16", "verify tf16 --level weights")
    group.add("weights of the way back", "verify hf --against small --level weights")
    group.add("all levels", "verify tf --level all", portable=False)
    group.add("self-test", "verify tf --self-test", portable=False)
    group.add("golden record", "golden record small --out golden-1 --note small", portable=False)
    group.add("against golden", "verify tf --against-golden golden-1", portable=False)
    group.add("golden record again", "golden record small --out golden-1")
    group.do(_duplicate("tf", "damaged"))
    group.do(_flip("damaged/tf_model.ckpt.data-00000-of-00001", 100_003))
    group.add("a flipped bit, weights", "verify damaged --level weights")
    group.add("a flipped bit, kept going", "verify damaged --level weights --keep-going")
    group.add("a flipped bit, check", "inspect damaged --check")
    group.add("undamaged, check", "inspect tf --check")
    group.add("inspect", "inspect small")
    group.add("inspect tf", "inspect tf")
    group.add("inspect stats", "inspect small --stats")
    group.add("diff of the same", "inspect small --diff tf")
    group.add("diff of a rounding", "inspect small --diff tf16")
    group.add("another model", ["new", "--out", "other", "--seed", "5", *SMALL])
    group.add("diff of others", "inspect small --diff other")
    group.add("others", "verify tf --against other --level weights")
    group.do(_duplicate("small", "shorter"))
    group.do(_set_field("shorter/config.json", n_layer=2))
    group.add("another structure", "verify tf --against shorter")
    group.add("inspect with a layer too many", "inspect shorter")
    group.add("no original", "verify small")
    group.add("nothing", "verify nope")
    group.add("inspect nothing", "inspect nope")
    group.add("unknown level", "verify tf --level everything")
    group.add("tolerance of 0", "verify tf --tolerance 0")
    group.do(_text("text.safetensors", "this is no checkpoint"))
    group.add("inspect a text", "inspect text.safetensors")
    return group


def _data() -> Group:
    group = Group("data")
    group.add("tokenizer", "new --out tokenizer --set n_layer=1 --set n_embd=16 --set n_head=2"
              " --set rotary_dim=4")  # fmt: skip
    group.do(_raw_texts)
    tail = "--tokenizer tokenizer --max-sequence-length 16 --processes"
    for form in ("tfrecord", "hdf5"):
        group.add(f"pile {form}", f"data pile a.jsonl --format {form} --out p-{form} {tail} 1")
        group.add(f"text {form}", f"data text texts --format {form} --out t-{form} {tail} 1")
        group.add(f"summarization {form}", f"data summarization pairs.jsonl --format {form}"
                  f" --out s-{form} --tokenizer tokenizer --max-sequence-length 32"
                  " --processes 1")  # fmt: skip
        for kind in "pts":
            group.add(f"inspect {kind} {form}", f"data inspect {kind}-{form}")
    group.add("pile of gzip, by 2", f"data pile a.jsonl.gz --out p-2 {tail} 2")
    group.add(
        "pile compressed", f"data pile a.jsonl --gzip --files-per-record 7 --out p-3 {tail} 1"
    )
    group.add(
        "pile shortened", f"data pile a.jsonl --short-seq-prob 0.5 --seed 4 --out p-4 {tail} 1"
    )
    group.add("pile, reference's remainder", f"data pile a.jsonl --reference-remainder"
              f" --no-write-remainder --files-per-record 7 --out p-5 {tail} 1")  # fmt: skip
    group.add("pile special", f"data pile a.jsonl --allow-special --out p-6 {tail} 1")
    group.add("summarization truncated", "data summarization pairs.jsonl --truncate-article"
              " --compare-bytes --out s-2 --tokenizer tokenizer --max-sequence-length 32"
              " --processes 1")  # fmt: skip
    group.add("instructions", "data instruct tasks.json --out i-1 --tokenizer tokenizer"
              " --max-sequence-length 128 --processes 1")  # fmt: skip
    group.add("chats", "data instruct chats.jsonl --out i-2 --tokenizer tokenizer --no-packing"
              " --max-sequence-length 32 --on-error skip --processes 2")  # fmt: skip
    group.add("an empty answer", f"data instruct chats.jsonl --out z {tail} 1")
    group.add("inspect i", "data inspect i-1")
    for n in range(2):
        group.add(f"pile, shard {n}", f"data pile a.jsonl --shard {n}/2 --out s {tail} 1")
    group.add("merge", "data merge s --out s-merged")
    group.add("inspect merged", "data inspect s-merged")
    group.add("merge what is merged", "data merge s-merged --out z")
    group.add("inspect as text", "data inspect p-tfrecord --tokenizer tokenizer --samples 1 --html"
              " page.html")  # fmt: skip
    group.add("out exists", f"data pile a.jsonl --out p-tfrecord {tail} 1")
    group.add("bad document", f"data pile bad.jsonl --out z {tail} 1")
    group.add("bad document skipped", f"data pile bad.jsonl --on-error skip --out p-7 {tail} 1")
    group.add("no source", f"data pile nope.jsonl --out z {tail} 1")
    group.add("no tokenizer", "data pile a.jsonl --out z --tokenizer texts --processes 1")
    group.add("no tokenizer option", "data pile a.jsonl --out z")
    group.add("length of 0", "data pile a.jsonl --out z --tokenizer tokenizer"
              " --max-sequence-length 0")  # fmt: skip
    group.add("test set with long pairs", "data summarization pairs.jsonl --test-set --out z"
              " --tokenizer tokenizer --max-sequence-length 32 --processes 1")  # fmt: skip
    group.add("inspect nothing", "data inspect texts")
    group.do(_duplicate("t-tfrecord", "damaged"))
    group.do(lambda d: _flip(str(next((d / "damaged").glob("*.tfrecord"))), 40)(d))
    group.add("inspect damaged", "data inspect damaged")
    group.add("doctor", "doctor", portable=False, numbers=False)
    group.add("plan of a preset", "doctor --plan tiny", portable=False, numbers=False)
    return group


def _train() -> Group:
    group = Group("train", slow=True)
    group.do(lambda d: shutil.copytree(GOLDEN_RUNS / "adamw", d, dirs_exist_ok=True))
    begin = "train --init-from hf --params params.yaml --max-steps 3"

    def run(name: str, more: str, out: str) -> None:
        group.add(name, f"{begin} {more} --model-dir {out}", portable=False)

    run("resident", "--set train_input.shuffle=true", "resident")
    group.add("resumed", "train --max-steps 5 --model-dir resident", portable=False)
    run("streaming", "--execution streaming", "streamed")
    run("accumulated", "--set optimizer.grad_accum_steps=2 --set model.residual_dropout_rate=0.1",
        "accumulated")  # fmt: skip
    run("adapter", "--set model.lora.rank=4 --set model.lora.targets=[q_proj,fc_out]", "lora")
    run("streamed adapter", "--execution streaming --set model.lora.rank=2"
        " --set model.lora.targets=[q_proj]", "streamed-lora")  # fmt: skip
    run("histograms", "--set model.tf_summary=true --mode train_and_eval --set"
        " optimizer.loss_scaling_factor=dynamic", "histograms")  # fmt: skip
    group.add("peft", "convert lora --to peft --out peft", portable=False)
    group.add("merged", "convert lora --to hf --out merged", portable=False)
    group.add("verify merged", "verify merged --against lora --level weights", portable=False)
    group.add("eval", "eval --model hf --params params.yaml", portable=False)
    group.add("eval of a run", "eval --model resident --execution streaming", portable=False)
    group.add("generate", "generate --model hf --ids 464,32,5 --max-new-tokens 5", portable=False)
    group.add("generate sampled", "generate --model hf --ids 4,3 --max-new-tokens 5 --temperature 1"
              " --top-k 7 --seed 3 --execution streaming", portable=False)  # fmt: skip
    group.add("runs", "runs resident streamed --html runs.html", portable=False)
    group.add("finished", "train --max-steps 2 --model-dir resident")
    group.add("validate", f"{begin} --validate-only --model-dir z", portable=False)
    group.add("plan", f"{begin} --dry-run --model-dir z", portable=False)
    group.add("for cs", "convert hf --to cs --out cs")
    group.add("cs dry run", "train --init-from cs --target csx --cs-ip 10.1.2.3 --max-steps 20"
              " --dry-run --model-dir cs-dry")  # fmt: skip
    group.add("cs validate", "train --init-from cs --target csx --max-steps 20 --validate-only"
              " --model-dir cs-run")  # fmt: skip
    group.add("no parameters", "train --init-from hf --max-steps 1 --model-dir z")
    group.add("unknown key", f"{begin} --set optimizer.nonsense=1 --model-dir z")
    group.add("bad value", f"{begin} --set train_input.batch_size=-1 --model-dir z")
    group.add("bad assignment", f"{begin} --set nonsense --model-dir z")
    group.add("no records", f"{begin} --set train_input.data_dir=nope --model-dir z")
    group.add("no weights", "train --init-from nope --params params.yaml --model-dir z")
    group.add("two origins", f"{begin} --checkpoint-path hf --model-dir z")
    group.add("eval of nothing", "eval --model nope --params params.yaml")
    group.add("generate without prompt", "generate --model hf")
    group.add("generate past the vocabulary", "generate --model hf --ids 5000")
    group.add("runs of nothing", "runs nope")
    group.do(_text("bad.yaml", "model: ["))
    group.add("bad YAML", "train --init-from hf --params bad.yaml --model-dir z")
    return group


def groups() -> list[Group]:
    """Return every group; those that take longest come first."""
    return [_train(), _convert(), _verify(), _data(), _optimizer(), _new()]


# Running and recording.


def _key_paths(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        by_data = sum(bool(NAMED_BY_DATA.search(key)) for key in value) > 5
        for key, item in value.items():
            yield from _key_paths(item, f"{path}.{'*' if by_data else key}")
        return
    if isinstance(value, list):
        for item in value:
            yield from _key_paths(item, f"{path}[]")
    yield path


def _digest(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:32]


def _event_tags(data: bytes) -> set[str]:
    """Tags of a TensorBoard file: Event.summary (5) . value (1) . tag (1)."""

    def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
        at = 0

        def varint() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte = message[at]
                at += 1
                value |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    return value

        while at < len(message):
            key = varint()
            kind = key & 7
            size = {0: 0, 1: 8, 5: 4}.get(kind)
            if kind == 0:
                varint()
                continue
            size = varint() if size is None else size
            yield key >> 3, message[at : at + size]
            at += size

    found: set[str] = set()
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = data[at + 12 : at + 12 + size]
        at += size + 16
        for summary in (v for n, v in fields(event) if n == 5):
            for value in (v for n, v in fields(summary) if n == 1):
                found |= {v.decode() for n, v in fields(value) if n == 1}
    return found


def _numbers(value: Any) -> Any:
    """Keep the numbers of a JSON value, by key, without those that the clock decides."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items() if k not in MEASURED}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return None if isinstance(value, str) else value


def _without(value: Any, dropped: set[str]) -> Any:
    if isinstance(value, dict):
        return {k: _without(v, dropped) for k, v in value.items() if k not in dropped}
    return [_without(v, dropped) for v in value] if isinstance(value, list) else value


def _file_digest(path: Path, folder: Path) -> Any:
    """A digest of what does not depend on the clock, the folder or the program's version."""
    data = path.read_bytes()
    if path.suffix == ".html":
        return "page"
    if path.name == ".lock":
        return "lock"
    if ".tfevents." in path.name or path.name.startswith("events.out"):
        return sorted(_event_tags(data))
    if path.suffix not in {".json", ".jsonl", ".yaml", ".txt", ".md", ".log", ""}:
        return _digest(data)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return _digest(data)
    text = text.replace(str(folder), "<folder>")
    if path.name == "README.md":
        text = re.sub(r"(?<=\| gptj )\d[\w.]*", "<version>", text)
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        kept = [_without(row, MEASURED) for row in rows]
        return {"keys": sorted(set(_key_paths(rows))), "values": _digest(json.dumps(kept))}
    if path.name in {"manifest.json", "recording.json"}:
        values = _without(json.loads(text), {"version", "versions", "gptj", "tool", "packages"})
        for name in list(values.get("source", {}).get("files", {})):
            if name == ".lock" or "tfevents" in name or name.endswith(".jsonl"):
                del values["source"]["files"][name]  # their sizes or names differ in every run
        config = path.with_name("config.json")
        if config.is_file() and str(folder) in config.read_text():
            del values["files"]["config.json"]  # its digest depends on the folder's name
        return {"keys": sorted(set(_key_paths(json.loads(text)))),
                "values": _digest(json.dumps(values, sort_keys=True))}  # fmt: skip
    return _digest(text)


def _snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    found: dict[str, tuple[int, int, int]] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[str(path.relative_to(folder))] = (
                status.st_ino, status.st_size, status.st_mtime_ns
            )  # fmt: skip
    return found


def _written(folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    after = _snapshot(folder)
    found: dict[str, Any] = dict.fromkeys(before.keys() - after.keys(), "removed")
    for name in after:
        if before.get(name) == after[name]:
            continue
        shown = re.sub(r"events\.out\.tfevents\.[^/]*", "events", name)
        found[shown] = _file_digest(folder / name, folder)
    return dict(sorted(found.items()))


def _run(case: Case, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    before = _snapshot(folder)
    command = [sys.executable, "-m", "runner.cli.root", *case.arguments, "--json"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if "Traceback" in done.stderr:
        print(done.stderr, file=sys.stderr)  # noqa: T201
    result: dict[str, Any] = {"exit": done.returncode}
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        result["stdout"] = "no JSON object"
    else:
        result["keys"] = sorted(set(_key_paths(answer)))
        if kind := (answer.get("error") or {}).get("kind"):
            result["error"] = kind
        elif case.numbers:
            result["numbers"] = _digest(json.dumps(_numbers(answer), sort_keys=True))
    files = _written(folder, before)
    if files:
        result["files"] = files
    if not case.portable:
        result["portable"] = False
    return result


def _run_group(group: Group, root: Path, environment: dict[str, str]) -> dict[str, Any]:
    folder = root / group.name
    folder.mkdir()
    found: dict[str, Any] = {}
    for case in group.cases:
        if case.do is not None:
            case.do(folder)
            continue
        assert case.name not in found, case.name
        found[case.name] = _run(case, folder, environment)
    return found


def record(only: Sequence[str] = ()) -> dict[str, Any]:
    """Run every case, two groups at a time, and return the results by case name."""
    with tempfile.TemporaryDirectory(prefix="gptj-matrix-") as name:
        root = Path(name).resolve()
        (root / "xla").mkdir()
        environment = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "GPTJ_DEBUG"}}
        environment["HF_HUB_OFFLINE"] = "1"
        environment["TF_XLA_FLAGS"] = (
            f"--tf_xla_persistent_cache_device_types=CPU"
            f" --tf_xla_persistent_cache_directory={root / 'xla'}"
        )
        chosen = [group for group in groups() if not only or group.name in only]
        with ThreadPoolExecutor(2) as pool:
            parts = pool.map(lambda group: _run_group(group, root, environment), chosen)
            return {name: result for part in parts for name, result in sorted(part.items())}


def portable(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results without what depends on the CPU: some files' digests, some key paths."""
    kept: dict[str, Any] = {}
    for name, result in results.items():
        kept[name] = dict(result)
        if not result.get("portable", True):
            kept[name].pop("keys", None)
            kept[name].pop("numbers", None)
            if "files" in result:
                kept[name]["files"] = dict.fromkeys(result["files"], "not compared")
    return kept


def differences(found: dict[str, Any], expected: dict[str, Any], path: str = "") -> list[str]:
    """List every place where two recordings differ, one line each."""
    lines: list[str] = []
    for key in sorted(found.keys() | expected.keys()):
        here = f"{path} · {key}" if path else key
        if key not in expected:
            lines.append(f"{here}: new: {json.dumps(found[key])[:200]}")
        elif key not in found:
            lines.append(f"{here}: gone: {json.dumps(expected[key])[:200]}")
        elif isinstance(found[key], dict) and isinstance(expected[key], dict):
            lines += differences(found[key], expected[key], here)
        elif isinstance(found[key], list) and isinstance(expected[key], list):
            lines += [f"{here}: new: {x}" for x in found[key] if x not in expected[key]]
            lines += [f"{here}: gone: {x}" for x in expected[key] if x not in found[key]]
        elif found[key] != expected[key]:
            lines.append(f"{here}: {found[key]}, expected {expected[key]}")
    return lines


def main() -> int:
    """Record or compare, as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--portable", action="store_true", help="ignore what depends on the CPU")
    parser.add_argument("--group", action="append", default=[], help="run this group alone")
    options = parser.parse_args()
    found = record(options.group)
    if options.portable:
        found = portable(found)
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{len(found)} cases")  # noqa: T201
        return 0
    expected = json.loads(options.file.read_text())
    if options.group:
        expected = {k: v for k, v in expected.items() if k.partition(":")[0] in options.group}
    if options.portable:
        expected = portable(expected)
    lines = differences(found, expected)
    for line in lines:
        print(line)  # noqa: T201
    print(f"{len(found)} cases, {len(lines)} differences")  # noqa: T201
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
