"""Imports: the command line stays light, and converting needs no framework."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "tensorflow", "keras", "transformers")

_PROBE = """
import json, sys
from runner.cli.root import main
code = main(sys.argv[1:])
loaded = sorted({name.partition(".")[0] for name in sys.modules})
print("\\n" + json.dumps({"code": code, "loaded": loaded}))
"""


def _loaded(*arguments: object, cwd: Path) -> set[str]:
    command = [sys.executable, "-c", _PROBE, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["code"] == 0, done.stderr
    return set(outcome["loaded"])


@pytest.mark.parametrize(
    "command", ["", "convert", "verify", "inspect", "train", "data", "generate", "doctor"]
)
def test_help_loads_nothing_heavy(command: str, tmp_path: Path):
    loaded = _loaded(*command.split(), "--help", cwd=tmp_path)
    assert not loaded & {*HEAVY, "numpy", "pydantic"}


def test_convert_needs_no_framework(small_hf: Path, tmp_path: Path):
    assert not _loaded("convert", small_hf, "--to", "tf", cwd=tmp_path) & set(HEAVY)


def test_verifying_weights_needs_no_framework(small_hf: Path, tmp_path: Path):
    _loaded("convert", small_hf, "--to", "tf", cwd=tmp_path)
    assert not _loaded("verify", "--level", "weights", cwd=tmp_path) & set(HEAVY)


def test_inspecting_needs_no_framework(small_hf: Path, tmp_path: Path):
    options = ("--stats", "--diff", small_hf)
    assert not _loaded("inspect", small_hf, *options, cwd=tmp_path) & set(HEAVY)


def test_making_records_needs_no_framework(tmp_path: Path):
    from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer

    write_tokenizer(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    options = ("--tokenizer", tmp_path, "--max-sequence-length", 8)
    assert not _loaded("data", "text", "a.txt", *options, cwd=tmp_path) & set(HEAVY)


@pytest.mark.parametrize("options", [[], ["--plan"]], ids=["facts", "plan"])
def test_examining_the_machine_needs_no_framework(options: list[str], tmp_path: Path):
    assert not _loaded("doctor", *options, cwd=tmp_path) & set(HEAVY)


def test_the_model_package_itself_loads_no_keras(tmp_path: Path):
    probe = "import sys, gptj_model.tensors, gptj_model.source; print('keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_is_loaded_with_tensorflow(tmp_path: Path):
    """PyTorch's CUDA build brings Triton, which ends the process if it comes second. What Keras
    would import only to connect to it is not loaded, and remains to be had."""
    (tmp_path / "triton.py").write_text("import sys; assert 'tensorflow' not in sys.modules")
    probe = (
        "import sys; from runner.cli.shared import framework; framework.prepare(); "
        "print({'triton', 'tensorflow'} <= sys.modules.keys(), "
        "sys.modules.keys() & {'sklearn', 'pandas', 'jax'}); import pandas"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout.strip(), done.returncode) == ("True set()", 0), done.stderr
