"""Memory over time of `gptj convert` beside a conversion that holds the whole model, as a picture.

    python benchmarks/memory.py WORK_FOLDER [--layers 4] [--picture docs/images/memory.svg]

Makes a random checkpoint of the 6B's width in float16. The peer is the script one would write
without this program, and what the reference implementation did: load the model with transformers in
float32, make TensorFlow variables of it, save them. Both are watched every 20 ms. Prints a table,
and writes the picture that docs/benchmarks.md shows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

GPTJ = (sys.executable, "-m", "runner.cli.root")
INTERVAL = 0.02

WHOLE_MODEL = """
import sys
import torch, transformers
import tensorflow as tf
transformers.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
variables = {name: tf.Variable(w.T if w.ndim == 2 else w) for name, w in weights.items()}
tf.train.Checkpoint(variables=variables).write(sys.argv[2])
"""

PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {{ w + 110 }} {{ h + 80 }}"
 font-family="sans-serif" font-size="13" role="img">
<title>Memory over time of two conversions</title>
<rect width="100%" height="100%" fill="white"/>
<g transform="translate(60, 20)">
{% for y, text in up %}<path d="M0 {{ y }}H{{ w }}" stroke="#ddd"/>
<text x="-8" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor %}{% for x, text in across -%}
<text x="{{ x }}" y="{{ h + 18 }}" text-anchor="middle">{{ text }}</text>
{% endfor %}<text x="{{ w / 2 }}" y="{{ h + 40 }}" text-anchor="middle">seconds</text>
<text x="-48" y="-6">GB resident</text>
{% for line in lines -%}
<polyline points="{{ line.points }}" fill="none" stroke="{{ line.colour }}" stroke-width="2"/>
<text x="{{ line.x }}" y="{{ line.y }}" fill="{{ line.colour }}">{{ line.name }}</text>
{% endfor %}</g>
</svg>
"""
WIDTH, HEIGHT = 640, 280
COLOURS = ("#c0392b", "#1f6fb2")

Curve = Sequence[tuple[float, float]]
"""Seconds from the start, and resident bytes at that time."""


def watched(*command: object) -> Curve:
    """Run a command to its end."""
    begun = time.monotonic()
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.DEVNULL)
    curve = [(0.0, 0.0)]
    while process.poll() is None:
        text = Path(f"/proc/{process.pid}/status").read_text()
        if found := re.search(r"VmRSS:\s+(\d+) kB", text):
            curve.append((time.monotonic() - begun, int(found[1]) * 1024))
        time.sleep(INTERVAL)
    if process.returncode:
        sys.exit(f"{command} ended with {process.returncode}")
    return [*curve, (time.monotonic() - begun, 0.0)]


def picture(curves: dict[str, Curve]) -> str:
    """Return the curves as SVG."""
    longest = max(t for curve in curves.values() for t, _ in curve)
    most = max(size for curve in curves.values() for _, size in curve)
    lines: list[dict[str, Any]] = []
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=True):
        places = [(t / longest * WIDTH, HEIGHT - size / most * HEIGHT) for t, size in curve]
        x, y = min(places, key=lambda place: place[1])
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        at = {"x": round(min(x, WIDTH - 180)), "y": round(y - 8)}
        lines.append({"name": name, "colour": colour, "points": points} | at)
    return (
        Environment(autoescape=True)
        .from_string(PICTURE)
        .render(
            w=WIDTH,
            h=HEIGHT,
            lines=lines,
            up=[(HEIGHT * (1 - n / 4), f"{most / 1e9 * n / 4:.1f}") for n in range(5)],
            across=[(WIDTH * n / 4, f"{longest * n / 4:.0f}") for n in range(5)],
        )
    )


def main() -> None:
    """Watch both, print the table, and draw."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / "source"
    if not source.exists():
        new = ("new", "--preset", "6b", "--set", f"n_layer={options.layers}", "--dtype", "float16")
        subprocess.run([*GPTJ, *new, "--out", source, "--quiet"], check=True)
    whole = options.folder / "whole" / "model.ckpt"
    whole.parent.mkdir(exist_ok=True)
    out = options.folder / "converted"
    curves = {
        "whole model in memory": watched(sys.executable, "-c", WHOLE_MODEL, source, whole),
        "gptj convert": watched(
            *GPTJ, "convert", source, "--to", "tf", "--out", out, "--quiet", "--force"
        ),
    }
    print(f"Blocks: {options.layers}.\n\n| | seconds | peak |\n| --- | --- | --- |")
    for name, curve in curves.items():
        print(f"| {name} | {curve[-1][0]:.1f} | {max(size for _, size in curve) / 1e9:.2f} GB |")
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_text(picture(curves), encoding="utf-8")


if __name__ == "__main__":
    main()
