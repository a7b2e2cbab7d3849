"""`gptj train` on a CS system, with programs in the client's place that check what they are
pointed to as the client does, and end as it does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import GOLDEN_RUNS

HF = GOLDEN_RUNS / "adamw" / "hf"

#: What stands in for a client: notes its arguments, reads what it is pointed to, and ends as told.
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys
pathlib.Path("called.json").write_text(json.dumps(sys.argv))
{checks}
how = os.environ.get("STAND_IN", "")
print("step 1 loss 7.0", flush=True)
if how == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (print("saving", flush=True), sys.exit(143)))
    signal.signal(signal.SIGINT, lambda *_: (print("saving", flush=True), sys.exit(130)))
    pathlib.Path("waiting").touch()
    signal.pause()
if how:
    print(how, file=sys.stderr, flush=True)
    sys.exit(7)
"""

CSZOO_CHECKS = """
import h5py
from ruamel.yaml import YAML
assert sys.argv[1] in ("fit", "validate")
trainer = YAML(typ="safe").load(pathlib.Path(sys.argv[2]).read_text())["trainer"]
section = trainer["fit" if sys.argv[1] == "fit" else "validate"]
if "ckpt_path" in section:
    with h5py.File(section["ckpt_path"]) as file:
        assert file.attrs["__SUCCESS__"]
loader = section["train_dataloader" if sys.argv[1] == "fit" else "val_dataloader"]
for folder in loader["data_dir"]:
    assert list(pathlib.Path(folder).glob("*.h5")), folder
"""

LEGACY_CHECKS = """
assert sys.argv[1] == "python-ws" and pathlib.Path(sys.argv[2]).is_file()
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert pathlib.Path(options["--params"]).is_file()
if "--checkpoint_path" in options:
    assert pathlib.Path(options["--checkpoint_path"] + ".index").is_file()
"""


@pytest.fixture
def client(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with both stand-ins on PATH and records for both."""
    programs = workdir / "bin"
    programs.mkdir()
    for name, checks in (("cszoo", CSZOO_CHECKS), ("csrun_wse", LEGACY_CHECKS)):
        path = programs / name
        path.write_text(STAND_IN.format(python=sys.executable, checks=checks))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    Path("data").mkdir()
    Path("data/data-0.h5").touch()
    Path("data/records.tfrecord").touch()
    Path("run.py").touch()
    return workdir


@pytest.fixture
def for_cs(client: Path, gptj) -> Path:
    assert gptj("convert", HF, "--to", "cs", "--quiet").code == 0
    return Path("converted-cs")


def _called() -> list[str]:
    return json.loads(Path("called.json").read_text())[1:]


def _trainer(path: str = "model_dir/trainer.yaml") -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(Path(path))["trainer"]


def test_the_current_client_is_called(for_cs: Path, gptj):
    done = gptj("train", "--init-from", for_cs, "--cs-ip", "10.1.2.3", "--max-steps", 20, "--json")
    assert done.code == 0, done.stderr
    assert _called() == ["fit", "model_dir/trainer.yaml"]
    init = _trainer()["init"]
    assert init["backend"] == {
        "backend_type": "CSX",
        "cluster_config": {"mgmt_address": "10.1.2.3:9000"},
    }
    assert init["loop"]["max_steps"] == 20
    assert done.json["client_exit_code"] == 0
    assert done.json["command"] == ["cszoo", "fit", "model_dir/trainer.yaml"]
    assert "step 1 loss 7.0" in done.stderr
    assert "step 1 loss 7.0" in Path("model_dir/client.log").read_text()


def test_evaluation_on_the_current_client(for_cs: Path, gptj):
    options = ("--init-from", for_cs, "--target", "csx", "--mode", "eval")
    assert gptj("train", *options).code == 2
    assert gptj("train", *options, "--eval-steps", 4).code == 0
    assert _called()[0] == "validate"


def test_the_references_program_is_called(client: Path, gptj):
    assert gptj("convert", HF, "--to", "tf", "--quiet").code == 0
    options = ("--init-from", "converted", "--target", "legacy", "--run-py", "run.py")
    done = gptj("train", *options, "--cs-ip", "10.1.2.3", "--max-steps", 20)
    assert done.code == 0, done.stderr
    assert _called() == [
        "python-ws", "run.py", "--model_dir", "model_dir", "--params", "converted/params.yaml",
        "--mode", "train", "--max_steps", "20", "--cs_ip", "10.1.2.3:9000",
        "--checkpoint_path", "converted/tf_model.ckpt",
    ]  # fmt: skip


def test_a_reference_yaml_becomes_the_clients(for_cs: Path, gptj):
    params = GOLDEN_RUNS / "adamw" / "params.yaml"
    Path("records").mkdir()
    Path("records/data-0.h5").touch()
    options = ("--init-from", for_cs, "--target", "csx", "--params", params)
    assert gptj("train", *options).code == 0
    trainer = _trainer()
    theirs = YAML(typ="safe", pure=True).load(params)
    found = trainer["init"]["optimizer"]["adamw"]
    assert found["weight_decay"] == theirs["optimizer"]["weight_decay_rate"]
    assert found["eps"] == theirs["optimizer"]["epsilon"]
    assert trainer["fit"]["train_dataloader"]["batch_size"] == theirs["train_input"]["batch_size"]


def test_a_dry_run_only_prints(for_cs: Path, gptj, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    Path("data/data-0.h5").unlink()
    done = gptj("train", "--init-from", for_cs, "--cs-ip", "10.1.2.3", "--dry-run", "--json")
    assert done.code == 0
    assert done.json["command"][:2] == ["cszoo", "fit"]
    assert len(done.json["missing"]) == 2
    assert "--format hdf5" in done.stderr
    assert not Path("model_dir").exists()
    assert not Path("called.json").exists()


@pytest.mark.parametrize(
    ("says", "hint"),
    [
        ("Error: all CSX systems are busy", "the system is taken"),
        ("grpc: StatusCode.UNAVAILABLE: failed to connect", "was not reached"),
        ("Compilation failed: kernel matching", "could not compile"),
        ("Segmentation fault", "its whole log is"),
    ],
)
def test_the_clients_failure_is_reported(says: str, hint: str, for_cs: Path, gptj, monkeypatch):
    monkeypatch.setenv("STAND_IN", says)
    done = gptj("train", "--init-from", for_cs, "--cs-ip", "10.1.2.3", "--json")
    assert done.code == 1
    assert done.json["ok"] is False
    assert done.json["client_exit_code"] == 7
    assert says in done.json["error"]["message"]
    assert hint in done.json["error"]["hint"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_are_forwarded(number: signal.Signals, code: int, for_cs: Path):
    command = [sys.executable, "-m", "runner.cli.root", "train", "--init-from", str(for_cs)]
    with subprocess.Popen(
        [*command, "--target", "csx"],
        env=os.environ | {"STAND_IN": "wait"},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        for line in process.stderr:
            if "step 1" in line:
                break
        while not Path("waiting").exists():
            assert process.poll() is None
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code
    assert "saving" in rest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--mode", "train_and_eval", "--cs-ip", "x"), "takes the modes train and eval"),
        (("--mode", "eval_all", "--cs-ip", "x"), "takes the modes train and eval"),
        (("--target", "legacy", "--cs-ip", "x"), "--run-py"),
        (("--target", "legacy", "--run-py", "run.py"), "--cs-ip"),
        (("--run-py", "run.py"), "goes with a CS system (--cs-ip, --target)"),
    ],
)
def test_what_a_cs_system_does_not_do(options: tuple[str, ...], words: str, for_cs: Path, gptj):
    done = gptj("train", "--init-from", for_cs, *options)
    assert done.code == 2
    assert words in done.stderr


def test_weights_in_another_format_are_converted_first(client: Path, gptj):
    done = gptj("train", "--init-from", HF, "--cs-ip", "10.1.2.3")
    assert done.code == 1
    assert f"gptj convert {HF} --to cs" in done.stderr


def test_what_is_missing_is_reported_before_anything_is_called(for_cs: Path, gptj, monkeypatch):
    Path("data/data-0.h5").unlink()
    done = gptj("train", "--init-from", for_cs, "--cs-ip", "10.1.2.3")
    assert done.code == 1
    assert "*.h5" in done.stderr
    assert not Path("called.json").exists()


def test_random_weights(client: Path, gptj):
    """A run starts from the reference's parameters; the same command then resumes with its own."""
    params = GOLDEN_RUNS / "adamw" / "params.yaml"
    Path("records").mkdir()
    Path("records/data-0.h5").touch()
    command = ("train", "--target", "csx", "--params", params, "--max-steps", 5)
    assert gptj(*command).code == 0
    assert _called() == ["fit", "model_dir/trainer.yaml"]
    trainer = _trainer()
    assert "ckpt_path" not in trainer["fit"]
    assert trainer["init"]["model"]["vocab_size"] == 512
    assert trainer["init"]["model"]["num_hidden_layers"] == 3
    assert trainer["init"]["loop"]["max_steps"] == 5

    shutil.copyfile(GOLDEN_RUNS / "cs" / "checkpoint_20.mdl", "model_dir/checkpoint_20.mdl")
    assert gptj(*command).code == 0
    assert _trainer()["fit"]["ckpt_path"].endswith("model_dir/checkpoint_20.mdl")
    assert gptj("convert", "model_dir", "--to", "hf", "--quiet").code == 0
    assert gptj("train", "--target", "csx", "--mode", "eval", "--eval-steps", 2).code == 0
    assert _called() == ["validate", "model_dir/trainer.yaml"]


def test_a_run_resumes_from_its_last_checkpoint(for_cs: Path, gptj):
    command = ("train", "--init-from", for_cs, "--target", "csx")
    assert gptj(*command).code == 0
    assert _trainer()["fit"]["ckpt_path"].endswith("converted-cs/model.mdl")
    for step in (9, 20):
        shutil.copyfile(
            GOLDEN_RUNS / "cs" / "checkpoint_20.mdl", f"model_dir/checkpoint_{step}.mdl"
        )
    assert gptj(*command).code == 0
    assert _trainer()["fit"]["ckpt_path"].endswith("model_dir/checkpoint_20.mdl")


def test_neither_a_checkpoint_nor_parameters(client: Path, gptj):
    done = gptj("train", "--target", "csx")
    assert done.code == 2
    assert "--init-from DIR" in done.stderr
    legacy = ("train", "--target", "legacy", "--cs-ip", "10.1.2.3", "--run-py", "run.py")
    assert gptj(*legacy).code == 2
    params = GOLDEN_RUNS / "adamw" / "params.yaml"
    Path("records").mkdir()
    Path("records/data.tfrecord").touch()
    assert gptj(*legacy, "--params", params).code == 0
    assert "--checkpoint_path" not in _called()


def test_a_run_keeps_the_settings_of_what_it_began_with(for_cs: Path, gptj):
    settings = for_cs / "config.json"
    values = json.loads(settings.read_text()) | {"eos_token_id": [3, 4], "pad_token_id": 1}
    settings.write_text(json.dumps(values))
    (for_cs / "chat_template.jinja").write_text("{{ messages }}")
    (for_cs / "additional_chat_templates").mkdir()
    (for_cs / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (for_cs / "LICENSE").write_text("All yours.")
    begin = ("train", "--init-from", for_cs, "--target", "csx", "--max-steps", 20)
    assert gptj(*begin, "--dry-run").code == 0
    assert not Path("model_dir").exists()
    assert gptj(*begin).code == 0
    shutil.copyfile(GOLDEN_RUNS / "cs" / "checkpoint_20.mdl", "model_dir/checkpoint_20.mdl")
    assert gptj("convert", "model_dir", "--to", "hf").code == 0
    found = json.loads(Path("converted-hf/config.json").read_text())
    assert (found["eos_token_id"], found["pad_token_id"]) == ([3, 4], 1)
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "LICENSE"):
        assert Path("converted-hf", name).read_bytes() == (for_cs / name).read_bytes()
    # The golden run's step is in its file, so the card knows that a run trained it.
    assert "up to step 20" in Path("converted-hf/README.md").read_text()
