"""Cached decoding beside transformers' in PyTorch, in one run.

    python benchmarks/generation.py WORK_FOLDER [--prompt 128] [--tokens 64] [--rounds 3]
        [--batch 1 8]

Both load the same weights (768 wide, 12 blocks, 162 million, float32) and continue the same
prompts greedily, with a cache, by the same number of tokens: transformers with `generate`, ours as
`gptj generate` does. Two processes take turns; the least times count, and the tokens must be
equal. Prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from side import Side

GPTJ = (sys.executable, "-m", "runner.cli.root")
VOCABULARY = 50400

#: Prompts and a number of tokens → what was added to each prompt.
Continue = Callable[[np.ndarray, int], list[list[int]]]


def transformers(folder: Path) -> Continue:
    """Return a function that continues prompts with transformers, the peer."""
    import torch
    from transformers import GPTJForCausalLM

    model = GPTJForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(ids_BT: np.ndarray, tokens: int) -> list[list[int]]:
        ids = torch.from_numpy(ids_BT)
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=50256,
            )
        return found[:, ids_BT.shape[1] :].tolist()

    return run


def gptj(folder: Path) -> Continue:
    """Return a function that continues prompts with this program."""
    from runner.cli.shared import framework

    framework.prepare()
    from gptj_model.decoding.generation import Generator
    from gptj_model.decoding.options import GenerationOptions
    from runner.evaluation.restore import load_model

    generator = Generator(load_model(folder))

    def run(ids_BT: np.ndarray, tokens: int) -> list[list[int]]:
        found = generator(ids_BT.tolist(), GenerationOptions(max_new_tokens=tokens))
        return [only.ids for (only,) in found]

    return run


SIDES = {"transformers, PyTorch": transformers, "gptj": gptj}


def serve(name: str, folder: Path) -> None:
    """Be one side: read a line, generate, print a line."""
    run = SIDES[name](folder)
    for line in sys.stdin:
        ids, tokens = json.loads(line)
        begun = time.perf_counter()
        found = run(np.asarray(ids), tokens)
        print(json.dumps([time.perf_counter() - begun, found]), flush=True)


def race(sides: dict[str, Side], batch: int, prompt: int, tokens: int, rounds: int) -> None:
    """Run both sides in turns and print their rows."""
    ids_BT = np.random.default_rng(batch).integers(0, 50256, (batch, prompt))
    first = dict.fromkeys(sides, np.inf)
    whole = dict.fromkeys(sides, np.inf)
    found: dict[str, Sequence[list[int]]] = {}
    for n in range(rounds + 1):
        for name, side in sides.items():
            one, _ = side.ask(json.dumps([ids_BT.tolist(), 1]))
            seconds, found[name] = side.ask(json.dumps([ids_BT.tolist(), tokens]))
            if n:  # the first compiles
                first[name] = min(first[name], one)
                whole[name] = min(whole[name], seconds)
    base, *_ = sides
    for name in sides:
        same = sum(a == b for a, b in zip(found[name], found[base], strict=True))
        speed = {k: batch * (tokens - 1) / (whole[k] - first[k]) for k in sides}
        print(
            f"| {batch} × {prompt} + {tokens} | {name} | {1000 * first[name]:.0f} ms | "
            f"{first[base] / first[name]:.2f} | {speed[name]:.1f} | "
            f"{speed[name] / speed[base]:.2f} | {same} of {batch} |",
            flush=True,
        )


def main() -> None:
    """Prepare both sides, run the races and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side, options.folder)
        return
    model = options.folder / "hf"
    if not model.exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        new = (*GPTJ, "new", "--preset", "125m", "--out", model, "--quiet")
        subprocess.run(new, check=True)
    sides = {name: Side(__file__, model, "--side", name) for name in SIDES}
    print("| prompts | | first token | ratio | tokens/s after it | ratio | same tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch in options.batch:
        race(sides, batch, options.prompt, options.tokens, options.rounds)
    for side in sides.values():
        side.stop()


if __name__ == "__main__":
    main()
