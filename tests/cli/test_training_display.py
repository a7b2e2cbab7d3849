"""What `gptj train` shows on a terminal, and what it leaves to stdout."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.training.display import sparkline


def test_a_curve_of_losses():
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([8.0, 1.0, 4.5]) == "█▁▅"
    many = sparkline([float(n) for n in range(1000)], width=8)
    assert many == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_panel_on_a_terminal_and_data_on_stdout(golden_run: Path):
    theirs, ours = pty.openpty()
    begin = ("train", "--init-from", "hf", "--params", "params.yaml", "--max-steps", "3")
    with subprocess.Popen(
        [sys.executable, "-m", "runner.cli.root", *begin, "--mode", "train_and_eval"],
        stderr=ours,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(ours)
        shown = b""
        while True:
            try:
                shown += os.read(theirs, 4096)
            except OSError:  # nobody is at the other end any more
                break
        assert process.stdout
        data = process.stdout.read()
    text = shown.decode()
    assert process.returncode == 0, text
    assert "step 3/3  loss " in text
    assert "█" in text
    assert "saved model_dir/model.ckpt-3" in text
    assert "tokens/s" in text
    assert data.startswith("eval/accuracy = ")
    assert "eval/accuracy" not in text
