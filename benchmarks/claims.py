"""Measure every claim about speed and memory again, beside its peer: `make bench`.

    python benchmarks/claims.py WORK_FOLDER [--only conversion data …] [--out build/benchmarks.md]

Runs the other programs of this folder one after the other, which takes about half an hour on 2
cores and 30 GB of disk, and writes their tables, a description of the machine, and which claims
hold on it. Other work on the machine makes every figure worse: leave it idle.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptj_convert.resources import machine
from gptj_model import __version__

#: The arguments of each program; `{}` is a folder of its own.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "transposition": (),
    "start": (),
    "conversion": ("{}", "--layers", "4", "--rounds", "3"),
    "data": ("{}", "--megabytes", "40", "--rounds", "2"),
    "reading": ("{}",),
    "generation": ("{}",),
    "training": ("{}", "--shapes", "2x256", "--rounds", "6"),
    "streaming": ("{}",),
}


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim about a cell of a program's table."""

    program: str
    row: str
    """Beginning of the row, its cells joined by a space."""
    column: str
    """Beginning of the column's heading, and after a dot its number among those, from 0."""
    bound: float
    at_most: bool = False
    """Whether the bound is an upper one."""

    @property
    def text(self) -> str:
        """The claim in words."""
        sign = "≤" if self.at_most else "≥"
        return f"{self.program}, {self.row}: {self.column.split('.')[0]} {sign} {self.bound:g}"

    def holds(self, value: float) -> bool:
        """Return whether a measured value satisfies the claim."""
        return value <= self.bound if self.at_most else value >= self.bound


CLAIMS = (
    Claim("conversion", "transposed .bin float16 → TF float32", "ratio", 1.0, at_most=True),
    Claim("conversion", "transposed .bin float16 → TF float16", "ratio", 1.1, at_most=True),
    Claim("conversion", "transposed .bin float16 → TF float32", "memory", 0.6, at_most=True),
    Claim("conversion", ".bin of column views, float16 → TF float32", "ratio", 2.0, at_most=True),
    Claim("conversion", "HF float16 → TF float32", "ratio", 1.15, at_most=True),
    Claim("conversion", "HF float16 → TF float16", "ratio", 1.6, at_most=True),
    Claim("conversion", "HF float16 → HF float16", "ratio", 1.15, at_most=True),
    Claim("conversion", "HF float16 → CS float16", "ratio", 1.3, at_most=True),
    Claim("conversion", "HF float16 → TF float32", "memory", 1.0, at_most=True),
    Claim("start", "tensorflow", "ratio", 0.8, at_most=True),
    Claim("data", "gptj data pile", "ratio", 10),
    Claim("data", "gptj data pile", "memory", 1.0, at_most=True),
    Claim("reading", "input_fn", "× what", 20),
    Claim("generation", "1 × 128 + 64 gptj", "ratio.1", 1.0),
    Claim("generation", "8 × 128 + 64 gptj", "ratio.1", 1.0),
    Claim("training", "2 × 256 float32 gptj", "ratio", 1.0),
    Claim("streaming", "streaming", "ratio", 1.1, at_most=True),
    Claim("streaming", "streaming", "memory", 6.0, at_most=True),
)


def run(program: str, folder: Path) -> str:
    """Run a program and return its stdout; its stderr is shown as it comes."""
    arguments = [a.format(folder / program) for a in PROGRAMS[program]]
    path = Path(__file__).with_name(f"{program}.py")
    done = subprocess.run(
        [sys.executable, str(path), *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    return done.stdout if done.returncode == 0 else f"(ended with {done.returncode})\n"


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield headings and rows of each table of a text in Markdown."""
    for lines in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        rows = [[c.strip() for c in x.strip("| \n").split("|")] for x in lines.splitlines()]
        rows = [r for r in rows if not all(set(c) <= set("-: ") and c for c in r)]
        yield rows[0], rows[1:]


def value(claim: Claim, text: str) -> float | None:
    """Return the number that a claim is about; None if the program printed no such row."""
    wanted, _, number = claim.column.partition(".")
    for headings, rows in tables(text):
        width = max(map(len, (headings, *rows)))
        padded = [""] * (width - len(headings)) + headings
        columns = [n for n, heading in enumerate(padded) if heading.startswith(wanted)]
        for row in rows:
            if " ".join(row).startswith(claim.row) and columns:
                cell = ([""] * (width - len(row)) + row)[columns[int(number or 0)]]
                found = re.search(r"[\d.]+", cell.replace(",", ""))
                return float(found.group()) if found else None
    return None


def machine_line() -> str:
    """Return a description of this machine in one line."""
    features = machine.cpu_features()
    simd = "AVX-512" if "avx512f" in features else "AVX2" if "avx2" in features else "no AVX2"
    return (
        f"gptj {__version__}; {machine.cpu_name() or platform.machine()}, {machine.cores():g} "
        f"cores, {simd}, {machine.memory_total() / 1e9:.0f} GB of memory; {platform.platform()}; "
        f"Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}"
    )


def verdicts(results: dict[str, str], claims: Sequence[Claim]) -> Iterator[str]:
    """Return a row for each claim about the programs that ran."""
    for claim in claims:
        if claim.program in results:
            found = value(claim, results[claim.program])
            verdict = "not measured" if found is None else "yes" if claim.holds(found) else "NO"
            yield f"| {claim.text} | {'' if found is None else f'{found:g}'} | {verdict} |"


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks.md"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, str] = {}
    for program in options.only:
        print(f"{program} …", file=sys.stderr, flush=True)
        results[program] = run(program, options.folder)
        print(results[program], flush=True)
    heading = "| claim | measured | holds here |\n| --- | --- | --- |\n"
    parts = [f"# Measured\n\n{machine_line()}\n\n{heading}"]
    parts.append("\n".join(verdicts(results, CLAIMS)) + "\n")
    parts += [f"\n## {name}\n\n{text}" for name, text in results.items()]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(parts), encoding="utf-8")
    print("".join(parts[:2]))


if __name__ == "__main__":
    main()
