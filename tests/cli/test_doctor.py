"""`gptj doctor`: facts of the machine, and plans that agree with what the commands take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gptj_convert.resources import machine
from tests.conftest import make_checkpoint

GB = 10**9


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch):
    """Make the machine appear to have this memory and disk, in GB."""

    def make(*, memory: float, disk: float) -> None:
        for name, size in (("memory_available", memory), ("memory_total", memory)):
            monkeypatch.setattr(machine, name, lambda size=size: int(size * GB))
        monkeypatch.setattr(machine, "disk_free", lambda folder: int(disk * GB))

    return make


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Make a distribution appear not to be installed."""
    installed = metadata.version

    def make(*names: str) -> None:
        def version(name: str) -> str:
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return installed(name)

        monkeypatch.setattr(metadata, "version", version)

    return make


def _facts(done) -> dict[str, dict]:
    return {fact["name"]: fact for fact in done.json["facts"]}


def _steps(done) -> dict[str, dict]:
    return {step["command"]: step for step in done.json["steps"]}


@pytest.fixture
def nvidia_smi(workdir: Path, monkeypatch: pytest.MonkeyPatch):
    """Give the machine the driver's tool, which prints these lines, or fails."""
    tool = workdir / "bin/nvidia-smi"
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")

    def make(*lines: str) -> None:
        shown = "".join(f"echo '{line}'\n" for line in lines) or "exit 9\n"
        tool.write_text(f"#!/bin/sh\n{shown}")
        tool.chmod(0o755)

    return make


NEW_GPU = "New GPU, 550.54.15, 81559, 80995, 9.0"


def test_gpus_are_described_as_the_driver_tells(nvidia_smi, gptj):
    nvidia_smi(NEW_GPU, "Old GPU, 550.54.15, 16384, [N/A], 7.0")
    facts = _facts(gptj("doctor", "--json"))
    new = "New GPU, 84.9 GB free of 85.5 GB, driver 550.54.15, compute capability 9.0"
    assert facts["GPU 0"]["value"] == new
    assert facts["GPU 1"]["value"] == "Old GPU, 17.2 GB, driver 550.54.15, compute capability 7.0"
    assert facts["bfloat16 on GPU"]["state"] == "warning"
    assert "float16" in facts["bfloat16 on GPU"]["fix"]
    assert "tensorflow-cpu" in facts["TensorFlow on GPU"]["fix"]
    nvidia_smi(NEW_GPU)
    assert _facts(gptj("doctor", "--json"))["bfloat16 on GPU"]["state"] == "ok"
    nvidia_smi()
    assert "none" in _facts(gptj("doctor", "--json"))["GPUs"]["value"]


def test_facts_are_lines_and_one_object(workdir: Path, gptj):
    shown = gptj("doctor")
    assert shown.code == 0
    assert "AVX2" in shown.stdout
    facts = _facts(gptj("doctor", "--json"))
    assert facts["numpy"]["value"] == metadata.version("numpy")
    assert {"Python", "torch", "memory", "disk", "direct I/O", "cszoo"} <= set(facts)
    assert not list(workdir.iterdir())


@pytest.mark.parametrize(
    ("package", "code", "fix"),
    [
        ("numpy", 1, "pip install -e '.'"),
        ("torch", 0, "pip install -e '.[hf]'"),
        ("pyarrow", 0, "pip install -e '.[data]'"),
    ],
)
def test_what_is_missing_is_reported_with_its_fix(
    package: str, code: int, fix: str, workdir: Path, without, gptj
):
    without(package)
    done = gptj("doctor", "--json")
    assert (done.code, done.json["ok"]) == (code, code == 0)
    assert (_facts(done)[package]["state"], _facts(done)[package]["fix"]) == ("missing", fix)
    assert fix in gptj("doctor").stdout


def test_a_token_is_noticed_and_never_shown(workdir: Path, gptj, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@hub.example")
    done = gptj("doctor", "--json")
    assert _facts(done)["hub token"]["value"] == "there"
    assert "secret" not in done.stdout + done.stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(workdir / "none"))
    assert "there" not in _facts(gptj("doctor", "--json"))["hub token"]["value"]


def test_a_folder_that_cannot_be_written_is_a_warning(workdir: Path, gptj, monkeypatch):
    def refuse(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "mkstemp", refuse)
    done = gptj("doctor", "--json")
    assert done.code == 0
    assert _facts(done)["direct I/O"]["state"] == "warning"


def test_the_plan_of_the_6b(workdir: Path, has, gptj):
    has(memory=512, disk=1000)
    done = gptj("doctor", "--plan", "--json")
    assert done.code == 0
    steps = _steps(done)
    disk = {command: round(step["disk"] / GB, 1) for command, step in steps.items()}
    assert disk["gptj download"] == disk["gptj convert --to tf"] == 24.2
    assert disk["gptj download --revision float16"] == 12.1
    assert disk["gptj convert --to tf --dtype keep"] == 12.1
    assert all(step["fits"] for step in steps.values())
    assert done.json["advice"] == []
    assert done.json["commands"] == [
        "gptj download",
        "gptj convert --to tf",
        "gptj verify --tolerance 1e-4",
        next(c for c in steps if c.startswith("gptj train --init-from converted/")),
    ]
    # Measured at the true width.
    assert steps["gptj verify --tolerance 1e-4"]["memory"] == pytest.approx(5.1 * GB, rel=0.1)
    assert steps["gptj convert --to tf"]["memory"] < 0.8 * GB
    assert not list(workdir.iterdir())


def test_what_trains_on_a_gpu(nvidia_smi, has, gptj):
    has(memory=20, disk=500)
    nvidia_smi(NEW_GPU, "Small GPU, 550.54.15, 24576, 24000, 8.6")
    steps = _steps(gptj("doctor", "--plan", "--json"))
    train = "gptj train --init-from converted/"
    assert steps[train]["on_gpus"] == []
    assert steps[f"{train} --set model.lora.rank=8"]["on_gpus"] == [0]
    assert steps[f"{train} --execution streaming"]["on_gpus"] == [0, 1]
    shown = gptj("doctor", "--plan").stdout
    assert "GPU 0, 1: yes" in shown


def test_the_same_plan_for_people(workdir: Path, has, gptj):
    has(memory=4, disk=40)
    shown = gptj("doctor", "--plan").stdout
    assert "24.2 GB" in shown
    assert "12.1 GB" in shown
    assert "time, estimated" in shown
    assert "no: too little memory" in shown


@pytest.mark.parametrize(
    ("disk", "commands"),
    [
        (60, ["gptj download", "gptj convert --to tf"]),
        (40, ["gptj download --revision float16", "gptj convert --to tf"]),
        (30, ["gptj download --revision float16", "gptj convert --to tf --dtype keep"]),
    ],
)
def test_a_small_machine_gets_advice(disk: int, commands: list[str], workdir: Path, has, gptj):
    has(memory=3, disk=disk)
    done = gptj("doctor", "--plan", "6b", "--json")
    assert done.json["commands"] == [*commands, "gptj verify --level weights"]
    steps = _steps(done)
    assert steps["gptj verify --tolerance 1e-4"]["short_of"] == ["memory"]
    assert steps["gptj verify --level weights"]["fits"]
    train = next(s for c, s in steps.items() if c.startswith("gptj train"))
    assert train["short_of"] == ["memory", "disk"]
    advice = " ".join(done.json["advice"])
    assert "only the weights are compared" in advice
    assert ("--revision float16" in advice) is (disk < 60)


def test_a_disk_that_is_too_small_for_all(workdir: Path, has, gptj):
    has(memory=512, disk=20)
    done = gptj("doctor", "--plan", "--json")
    assert done.code == 0
    assert "work in a folder on another disk" in done.json["advice"][0]
    assert done.json["commands"][-1].endswith("--model-dir /on/another/disk/model_dir")


def test_a_smaller_batch_where_the_usual_one_does_not_fit(workdir: Path, has, gptj, monkeypatch):
    has(memory=20, disk=100)
    monkeypatch.setattr(machine, "memory_total", lambda: 256 * GB)
    commands = gptj("doctor", "--plan", "125m", "--json").json["commands"]
    assert "--set train_input.batch_size=1" in commands[-1]
    assert commands[0] == "gptj new --preset 125m --out gpt-j-125m"


@pytest.mark.parametrize("given", ["hf", "hf/config.json"])
def test_plans_agree_with_the_conversion_itself(given: str, hf: Path, gptj):
    dry = gptj("convert", "hf", "--to", "tf", "--dry-run", "--json")
    assert not Path("converted").exists()
    steps = _steps(gptj("doctor", "--plan", given, "--json"))
    step = steps["gptj convert hf --to tf"]
    assert step["disk"] == dry.json["disk_bytes"]
    assert step["memory"] == dry.json["planned_rss_bytes"]
    assert ("gptj download OWNER/NAME" in steps) is (given != "hf")
    done = gptj("convert", "hf", "--to", "tf", "--json")
    assert done.json["planned_rss_bytes"] == step["memory"]
    data = Path("converted/tf_model.ckpt.data-00000-of-00001")
    assert data.stat().st_size == step["disk"]


def test_a_folder_with_a_config_alone_is_enough(hf: Path, gptj):
    (hf / "model.safetensors").unlink()
    done = gptj("doctor", "--plan", "hf", "--json")
    assert done.json["commands"][0] == "gptj download OWNER/NAME"


def test_what_is_no_model_is_refused(workdir: Path, gptj):
    done = gptj("doctor", "--plan", "nothing", "--json")
    assert done.code == 1
    assert "not found" in done.json["error"]["message"]


def test_planned_and_measured_memory_are_printed(hf: Path, gptj):
    assert "needs 0.00 GB of disk" in gptj("convert", "hf", "--to", "tf", "--dry-run").stderr
    assert "GB, planned 0." in gptj("convert", "hf", "--to", "tf").stderr
    done = gptj("verify", "--level", "weights", "--json")
    assert "GB, planned 0." in done.stderr
    assert done.json["planned_rss_bytes"] < gptj("verify", "--json").json["planned_rss_bytes"]


def test_memory_is_what_was_planned(workdir: Path):
    """The true width gives strips their true size."""
    make_checkpoint(workdir / "hf", dtype="float16", n_embd=4096, n_layer=1, n_head=16)
    for arguments in (("convert", "hf", "--to", "tf"), ("verify", "--level", "weights")):
        command = [sys.executable, "-m", "runner.cli.root", *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        fields = json.loads(done.stdout)
        ratio = fields["peak_rss_bytes"] / fields["planned_rss_bytes"]
        assert 0.8 < ratio < 1.1, arguments
