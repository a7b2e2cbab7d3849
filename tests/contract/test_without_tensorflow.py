"""Everything that JAX computes works in an environment without TensorFlow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: Python that acts as if TensorFlow were not installed.
_BLOCKED = "import sys; sys.modules['tensorflow'] = None\n"
_MODULES = (
    _BLOCKED
    + """
import json, pkgutil, importlib
import gptj_convert, gptj_model, golden, runner
failed = []
for package in (gptj_model, golden, gptj_convert, runner):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ImportError as e:
            assert e.name == "tensorflow", (module.name, e)
            failed.append(module.name)
print(json.dumps(failed))
"""
)
_COMMANDS = (
    _BLOCKED
    + """
import json
from runner.cli.root import main
print(json.dumps([main(arguments) for arguments in json.loads(sys.argv[1])]))
"""
)
_COMPILING = (
    "XLA_FLAGS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)
#: Modules that only runs on TensorFlow use.
OF_TENSORFLOW = (
    "gptj_model.serving.",
    "gptj_model.streaming.shared_tensor",
    "gptj_model.streaming.training",
    "runner.evaluation.compiled",
    "runner.training.executors.resident",
    "runner.training.executors.step",
    "runner.training.streamed.",
    "runner.training.update.optimizer",
)


def _run(program: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-c", program, *arguments]
    root = str(Path(__file__).parents[2])
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONPATH": root}
    environment |= {"KERAS_BACKEND": "jax"} | {k: os.environ[k] for k in _COMPILING}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_only_runs_on_tensorflow_import_it(tmp_path: Path):
    failed = json.loads(_run(_MODULES, cwd=tmp_path).splitlines()[-1])
    assert [name for name in failed if not name.startswith(OF_TENSORFLOW)] == []


@pytest.mark.parametrize("level", ["logits", pytest.param("all", marks=pytest.mark.full)])
def test_every_command_that_computes(level: str, small_hf: Path, tmp_path: Path):
    """On JAX by default, where TensorFlow is not installed; tests/cli/test_backend_jax.py trains
    and evaluates so."""
    shutil.copytree(small_hf, tmp_path / "small")
    commands = [
        "convert small --to tf --out small_tf",
        f"verify small_tf --level {level}",
        "generate --model small_tf --ids 5,17,3 --max-new-tokens 4",
        "generate --model small_tf --ids 5,17,3 --max-new-tokens 4 --execution streaming",
        "doctor",
    ]
    lists = [command.split() for command in commands]
    codes = json.loads(_run(_COMMANDS, json.dumps(lists), cwd=tmp_path).splitlines()[-1])
    assert dict(zip(commands, codes, strict=True)) == dict.fromkeys(commands, 0)
