"""Every block of commands in the docs runs, page by page and in order, on a small model.

The folders that a reader is expected to have, the stand-in for the 6B among them, are made here.
A block that says what it needs is not run; `tests/contract/test_docs.py` parses it all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from tests.conftest import make_checkpoint
from tests.doc_commands import PAGES, REPOSITORY, blocks

#: Pages that are run: those with a block that needs nothing.
RUN = [page for page in PAGES if any(b.needs is None for b in blocks(page))]
TEXT = "the quick brown fox jumps over the lazy dog, and sleeps. " * 400


@pytest.fixture
def reader(workdir: Path) -> Path:
    """The folder of a reader of the docs."""
    make_checkpoint(Path("gpt-j-6b"), vocab_size=50400, n_positions=2048, dtype="float16")
    write_tokenizer(Path("gpt-j-6b"))
    for folder in ("my-texts", "held-out", "pile", "cnn-dailymail"):
        Path(folder).mkdir()
    Path("my-texts/a.txt").write_text(TEXT)
    Path("held-out/a.txt").write_text(TEXT[:9000])
    Path("pile/00.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    pair = {"article": TEXT[:900], "highlights": "a fox jumps"}
    for path in ("cnn-dailymail/train.jsonl", "my-pairs.jsonl"):
        Path(path).write_text(json.dumps(pair) + "\n")
    task = {"instruction": "Name three colors.", "input": "", "output": "Red, green, blue."}
    Path("alpaca_data.json").write_text(json.dumps([task] * 60, indent=4))
    Path("faq.csv").write_text("question,answer\n" + "What is it?,A fox.\n" * 20)
    return workdir


@pytest.mark.full
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_a_page_is_followed(page: Path, reader: Path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    for block in blocks(page):
        if block.needs is None:
            done = subprocess.run(
                ["bash", "-e"], input=block.text, env=environment, capture_output=True, text=True
            )
            shown = f"{page.name}:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"
            assert done.returncode == 0, shown
