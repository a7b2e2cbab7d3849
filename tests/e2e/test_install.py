"""The built distribution in an environment of its own: small without extras, clear about them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.full


def _run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(REPOSITORY, out / "source", ignore=ignored)
    build = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out)
    done = _run(*build, source, cwd=out)
    assert done.returncode == 0, done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment's programs."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    assert _run(sys.executable, "-m", "venv", folder, cwd=folder.parent).returncode == 0
    done = _run(folder / "bin/pip", "install", "--quiet", wheel, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    assert _run(folder / "bin/pip", "check", cwd=folder.parent).returncode == 0
    return folder / "bin"


def test_the_wheel_holds_the_program_and_no_tests(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "golden", "gptj_convert", "gptj_model", "runner",
    }  # fmt: skip
    for needed in ("golden/tiny/outputs.npz", "runner/configs/params_gptj.yaml",
                   "gptj_convert/verification/report.html.j2",
                   "gptj_convert/conversion/card.md.j2", "gptj_model/py.typed"):  # fmt: skip
        assert needed in names


def test_converting_needs_no_extra(installed: Path, tmp_path: Path):
    def gptj(*arguments: str) -> subprocess.CompletedProcess[str]:
        return _run(installed / "gptj", *arguments, cwd=tmp_path)

    assert gptj("new", "--preset", "tiny", "--out", "m").returncode == 0
    for target in ("tf", "hf", "keras", "cs"):
        done = gptj("convert", "m", "--to", target, "--out", target)
        assert done.returncode == 0, done.stderr
    done = gptj("verify", "tf", "--level", "weights", "--json")
    assert json.loads(done.stdout)["ok"], done.stderr
    for extra, command in {
        "tf": ("train", "--init-from", "tf"),
        "hf": ("verify", "tf"),
    }.items():
        done = gptj(*command)
        assert done.returncode == 1
        assert "is not installed" in done.stderr
        assert f"gptj-tf[{extra}]" in done.stderr or "gptj-tf[tf]" in done.stderr
    packages = _run(installed / "pip", "list", cwd=tmp_path).stdout
    assert "tensorflow" not in packages
    assert "torch" not in packages
