"""Run every proof and measurement on a GPU machine, each under its own time limit.

    python gpu/stages.py --out FOLDER [--seconds 460] [--tiny] [--only NAME …]

The stages run one after the other, the most valuable first. After each of them FOLDER has
results.json and table.md, so a run that is cut short still tells something; log.txt has all output.
A stage that fails or exceeds its limit is a row with its error. --tiny runs all of them with tiny
models, on a CPU too. Exit code 0: every stage ran and every proof holds, whatever the speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

KIT = Path(__file__).parents[1]
GPTJ = (sys.executable, "-m", "runner.cli.root")
MEASURE = (sys.executable, str(KIT / "benchmarks/accelerator.py"))
#: Relative: products of training are rounded to 10 bits (TF32) where the GPU can.
ROUNDED = 2e-3
#: Results of a stage by its name; a failed one has `error`.
Results = dict[str, dict[str, Any]]


class Failed(Exception):
    """A stage did not finish; its message is for the table."""


class Shell:
    """Runs programs, one at a time, within the time of a stage.

    Args:
        folder: current folder of the programs.
        log: open file that gets their stderr.
    """

    def __init__(self, folder: Path, log: Any) -> None:
        self.folder = folder
        self.until = 0.0
        self._log = log
        self._running: subprocess.Popen[str] | None = None
        self._stopped = 0

    def __call__(
        self, *command: object, folder: Path | None = None, memory: str | None = None
    ) -> str:
        """Run a program and return its stdout.

        Args:
            command: the program and its arguments.
            folder: its current folder; None means that of the shell.
            memory: share of the GPU's memory that JAX takes at once; None means that it takes what
                it needs.

        Raises:
            Failed: it exits with another code than 0 or 3, or the time is over.
            SystemExit: this program was told to stop.
        """
        words = [str(word) for word in command]
        self._log.write(f"\n$ {' '.join(words)}\n".encode())
        self._log.flush()
        begun = self._log.tell()
        set_here = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if memory:
            set_here = {"XLA_PYTHON_CLIENT_MEM_FRACTION": memory}
        # What one program has compiled, another one need not.
        set_here["JAX_COMPILATION_CACHE_DIR"] = str(self.folder / "compiled")
        process = subprocess.Popen(
            words, cwd=folder or self.folder, env=os.environ | set_here, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=self._log, text=True, start_new_session=True,
        )  # fmt: skip
        self._running = process
        if self._stopped:  # while it was started
            _kill(process)
        try:
            out, _ = process.communicate(timeout=max(0.1, self.until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _kill(process)
            process.communicate()
            raise Failed("exceeded its time limit") from None
        finally:
            self._running = None
        if self._stopped:
            sys.exit(128 + self._stopped)
        self._log.write(out.encode())
        self._log.flush()
        if process.returncode not in (0, 3):  # 3 is a mismatch, which the JSON object describes
            raise Failed(f"exit code {process.returncode}: {self._last_line(begun)}")
        return out

    def stop(self, number: int, frame: Any) -> None:
        """End the program that is running, and then this one; a handler of signals."""
        del frame
        self._stopped = number
        if self._running:
            _kill(self._running)

    def json(self, *command: object, **options: Any) -> dict[str, Any]:
        """Run a program whose last line of stdout is a JSON object, and return that."""
        lines = self(*command, **options).strip().splitlines()
        if not lines:
            raise Failed("printed nothing")
        return json.loads(lines[-1])

    def _last_line(self, begun: int) -> str:
        text = Path(self._log.name).read_bytes()[begun:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:") or "Error" in line]
        return (errors or lines or [""])[-1][:300]


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill a program and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Stage:
    """One proof or measurement."""

    name: str
    seconds: float
    """Longest time that it may take."""
    run: Callable[[Shell], dict[str, Any]]


# Proofs.


def verify(new: Sequence[str], level: str, shell: Shell) -> dict[str, Any]:
    """Make a random checkpoint, convert it, and verify it against transformers."""
    name = f"verified-{len(list(shell.folder.iterdir()))}"
    shell(*GPTJ, "new", *new, "--out", name, "--quiet")
    shell(*GPTJ, "convert", name, "--to", "tf", "--out", f"{name}-tf", "--quiet")
    compare = ("--against", name, "--level", level, "--backend", "jax", "--json")
    found = shell.json(*GPTJ, "verify", f"{name}-tf", *compare)
    shutil.rmtree(shell.folder / name)
    shutil.rmtree(shell.folder / f"{name}-tf")
    levels: Mapping[str, Mapping[str, Any]] = found["levels"]
    return {
        "ok": found["ok"],
        "told": ", ".join(f"{k} {'ok' if v['ok'] else 'DIFFERS'}" for k, v in levels.items()),
        "first_difference": found.get("first_difference"),
    }


def golden_run(shell: Shell) -> dict[str, Any]:
    """Repeat a recorded run of the reference, and compare the losses of its 20 steps."""
    folder = shell.folder / "golden"
    shutil.copytree(KIT / "tests/golden_runs/adamw", folder)
    options = ("--backend", "jax", "--set", "runconfig.mesh=[1,1]", "--quiet")
    start = ("--init-from", "hf", "--params", "params.yaml")
    shell(*GPTJ, "train", *start, *options, folder=folder)
    recorded = json.loads((folder / "reference.json").read_text())["summaries"]["loss"]
    lines = (folder / "model_dir/metrics.jsonl").read_text().splitlines()
    losses = {str(row["step"]): row["loss"] for row in map(json.loads, lines) if "loss" in row}
    if losses.keys() != recorded.keys():
        raise Failed(f"found the losses of {len(losses)} steps, expected {len(recorded)}")
    worst = max(abs(losses[step] / loss - 1) for step, loss in recorded.items())
    told = f"losses of {len(losses)} steps within {worst:.1e}, allowed {ROUNDED:.0e}"
    return {"ok": worst <= ROUNDED, "told": told, "relative": worst}


def measured(side: str, options: Sequence[str], shell: Shell) -> dict[str, Any]:
    """Measure one side; see benchmarks/accelerator.py."""
    return shell.json(*MEASURE, side, *options, memory="0.94")


def stages(tiny: bool) -> list[Stage]:
    """Return the stages, the most valuable first."""
    small = ("--preset", "tiny", "--set", "vocab_size=512")
    true = ("--preset", "6b")
    of_6b = (*small, "--length", "64", "--batch", "2", "--steps", "2") if tiny else true
    writing = (*small, "--length", "16", "--new", "8") if tiny else (*true, "--length", "128")
    proof = ("--preset", "tiny", "--set", "vocab_size=512")
    # A small vocabulary: the blocks are what is proven.
    wide = proof if tiny else (
        "--preset", "6b", "--set", "n_layer=2", "--set", "vocab_size=4096", "--dtype", "float16",
    )  # fmt: skip
    return [
        Stage("verify tiny", 90, partial(verify, proof, "all")),
        Stage("golden run", 50, golden_run),
        Stage("train flash", 110, partial(measured, "train", (*of_6b, "--flash"))),
        Stage("train peer", 90, partial(measured, "train-peer", of_6b)),
        Stage("generate", 100, partial(measured, "generate", writing)),
        Stage("generate peer", 60, partial(measured, "generate-peer", writing)),
        Stage("train plain", 90, partial(measured, "train", of_6b)),
        Stage("lora flash", 80, partial(measured, "train", (*of_6b, "--lora", "--flash"))),
        Stage("lora peer", 70, partial(measured, "train-peer", (*of_6b, "--lora"))),
        Stage("verify wide", 90, partial(verify, wide, "logits")),
    ]


# The table.


@dataclass(frozen=True, slots=True)
class Aim:
    """A figure that is wanted of a stage, or of its ratio to another."""

    text: str
    key: str
    least: float


MFU = Aim("MFU ≥ 45 %", "mfu", 0.45)
BANDWIDTH = Aim("≥ 70 % of the bandwidth", "bandwidth", 0.7)
FASTER = Aim("≥ 1.2 × PyTorch", "ratio", 1.2)
#: Rows of measurements: title, our stage, the peer's stage, aims.
ROWS: tuple[tuple[str, str, str, tuple[Aim, ...]], ...] = (
    ("training, flash attention", "train flash", "train peer", (MFU, FASTER)),
    ("training, plain attention", "train plain", "train peer", ()),
    ("LoRA, flash attention", "lora flash", "lora peer", (FASTER,)),
    ("generation, one prompt", "generate", "generate peer", (BANDWIDTH,)),
)
#: Rows of proofs: title, stage.
PROOFS = (
    ("verify, tiny model, all levels", "verify tiny"),
    ("verify, 2 blocks of the 6B's width", "verify wide"),
    ("training against a recorded run", "golden run"),
)


def table(results: Results) -> str:
    """Return the results as Markdown."""
    rows = [("", "gptj on JAX", "PyTorch, transformers", "ratio", "aims"), ("---",) * 5]
    rows += [(title, _proof(results.get(name)), "", "", "") for title, name in PROOFS]
    for title, ours, peer, aims in ROWS:
        a, b = results.get(ours), results.get(peer)
        ratio = None
        if a and b and "tokens_per_second" in a and "tokens_per_second" in b:
            ratio = a["tokens_per_second"] / b["tokens_per_second"]
        figures = (a or {}) | {"ratio": ratio}
        verdicts = "; ".join(f"{aim.text}: {_verdict(figures.get(aim.key), aim)}" for aim in aims)
        shown = "" if ratio is None else f"{ratio:.2f}"
        rows.append((title, _figures(a), _figures(b), shown, verdicts))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _verdict(value: float | None, aim: Aim) -> str:
    if value is None:
        return "not measured"
    return "reached" if value >= aim.least else "missed"


def _proof(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if "error" in found:
        return _cell(f"failed: {found['error']}")
    return _cell(f"{'ok' if found['ok'] else 'MISMATCH'}: {found['told']}")


def _figures(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not run"
    if "error" in found:
        return _cell(f"failed: {found['error']}")
    parts = [f"{found['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in found:
        parts.append(f"MFU {found['mfu']:.1%}")
    if "bandwidth" in found:
        parts.append(f"{found['bandwidth']:.0%} of the bandwidth")
    if "seconds_per_step" in found:
        size = f"{found['batch']} × {found['length']}"
        parts.append(f"{found['seconds_per_step']:.3f} s for {size} tokens")
        parts.append(f"first step {found['first_step_seconds']:.0f} s")
    else:
        first = f"{found['first_token_seconds'] * 1e3:.0f} ms"
        parts.append(f"first of {found['prompt']} + {found['new']} tokens {first}")
        if "unawaited_tokens_per_second" in found:
            parts.append(f"{found['unawaited_tokens_per_second']} without choosing tokens")
    parts.append(f"{found['attention']} attention, {found['weights']} weights")
    if "flash_difference" in found:
        parts.append(f"kernel within {found['flash_difference']} of the plain product")
    if found.get("peak_bytes"):
        parts.append(f"{found['peak_bytes'] / 1e9:.1f} GB")
    return _cell(", ".join(parts))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def heading(results: Results, seconds: float) -> str:
    """Return what was measured on what, in a line."""
    having = [r for r in results.values() if "device" in r]
    named = sorted({f"{r['device']}; {r['library']}" for r in having})
    taken = f"{time.strftime('%Y-%m-%d')}, {len(results)} stages in {seconds:.0f} s"
    return f"{'; '.join([taken, *named])}\n\n"


def main() -> int:
    """Run the stages and write the results after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=460)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in stages(options.tiny) if not options.only or s.name in options.only]
    begun, results = time.monotonic(), Results()
    with (
        tempfile.TemporaryDirectory() as folder,
        (options.out / "log.txt").open("wb+") as log,
    ):
        shell = Shell(Path(folder), log)
        signal.signal(signal.SIGTERM, shell.stop)
        signal.signal(signal.SIGINT, shell.stop)
        for stage in chosen:
            started = time.monotonic()
            left = options.seconds - (started - begun)
            shell.until = started + min(stage.seconds, left)
            try:
                if left < 1:
                    raise Failed("no time is left")
                found = stage.run(shell)
            except Failed as e:
                found = {"error": str(e)}
            except (OSError, ValueError, KeyError) as e:  # an answer of another form
                found = {"error": f"{type(e).__name__}: {e}"}
            found["seconds"] = round(time.monotonic() - started, 1)
            results[stage.name] = found
            text = heading(results, time.monotonic() - begun) + table(results)
            (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
            (options.out / "table.md").write_text(text, encoding="utf-8")
            print(f"{stage.name}: {found.get('error') or 'done'}, {found['seconds']} s", flush=True)
    print(table(results))
    return int(any("error" in r or r.get("ok") is False for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
