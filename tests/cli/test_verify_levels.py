"""`gptj verify`: levels that run models, recordings of an original, self-test, report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from keras import ops

import golden
from gptj_model.network import layers
from gptj_model.streaming import forward
from tests.cli.rewriting import rewrite_bundle
from tests.conftest import load_tensors, make_checkpoint, save_tensors

_Q = "gptj_decoder/1/attn/q_proj/q_proj/kernel"


def test_all_levels_pass(converted: Path, gptj):
    done = gptj("verify", "--level", "all", "--thorough", "--json")
    assert done.code == 0, done.stdout
    levels = done.json["levels"]
    assert list(levels) == ["structure", "weights", "logits", "gradients", "generation", "tasks"]
    assert 0 < levels["gradients"]["relative"] < 2e-4
    assert len(levels["gradients"]["tensors"]) == levels["weights"]["tensors"]
    for sequence in levels["generation"]["sequences"]:
        assert len(sequence["expected"]) == 18
        assert all(found == sequence["expected"] for found in sequence["found"].values())
    assert levels["tasks"]["source"].startswith("built in: ")
    assert 0 < levels["tasks"]["relative"] < 2e-5
    by_name = {row["name"]: row for row in levels["logits"]["prompts"]}
    assert by_name["full length"]["tokens"] == 2048
    assert by_name["padded batch"]["tokens"] == 2 + 17 + 16
    assert len(by_name["text"]["hidden_by_token"][0]) == by_name["text"]["tokens"]


@pytest.mark.parametrize("tied", ["in the original", "by the conversion"])
def test_a_tied_model_passes_gradients(tied: str, workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf", tie_word_embeddings=tied == "in the original")
    share = ()
    if tied == "by the conversion":
        tensors = load_tensors(hf / "model.safetensors")
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
        save_tensors(hf / "model.safetensors", tensors)
        share = ("--share-embeddings",)
    assert gptj("convert", "hf", "--to", "tf", *share).code == 0
    assert gptj("verify", "--level", "gradients").code == 0


def test_the_noise_floor_stands_beside_the_figure(converted: Path, gptj):
    logits = gptj("verify", "--json").json["levels"]["logits"]
    floor = logits["noise_floor"]
    assert 0 < floor["relative"] < 1e-4
    assert 0 < floor["ours"] < 1e-4
    assert logits["rounding"] is None


def test_what_rounding_changes_is_reported_and_not_judged(hf: Path, gptj):
    assert gptj("convert", hf, "--to", "tf", "--dtype", "bfloat16").code == 0
    done = gptj("verify", "--json")
    assert done.code == 0
    assert (
        done.json["levels"]["logits"]["rounding"] > 1e-4 > done.json["levels"]["logits"]["relative"]
    )


def test_wrong_gradients_name_the_tensor(converted: Path, gptj, monkeypatch: pytest.MonkeyPatch):
    # Forwards it is right; backwards nothing goes through the values of block 1's attention.
    sound = layers.Attention.call
    resident = forward.StreamedModel.load_block
    at: list[int] = []

    def load(self, i):
        at[:] = [i]
        return resident(self, i)

    def call(self, h_BTD, *rest, **options):
        out, cache = sound(self, h_BTD, *rest, **options)
        return (ops.stop_gradient(out) if at == [1] else out), cache

    monkeypatch.setattr(forward.StreamedModel, "load_block", load)
    monkeypatch.setattr(layers.Attention, "call", call)
    done = gptj("verify", "--level", "gradients", "--json")
    assert done.code == 3
    first = done.json["first_difference"]
    assert first["level"] == "gradients"
    assert first["tensor"]["hf"] == "transformer.h.1.attn.out_proj.weight"


def test_other_tokens_are_a_mismatch(converted: Path, gptj):
    rewrite_bundle(converted, lambda t: t.update({_Q: -t[_Q]}))
    done = gptj("verify", "--against", "hf", "--level", "all", "--keep-going", "--json")
    assert done.code == 3
    levels = done.json["levels"]
    assert [levels[name]["ok"] for name in ("logits", "gradients", "generation")] == [False] * 3
    assert done.json["first_difference"]["level"] == "weights"


def test_a_prompt_names_block_and_operation(converted: Path, gptj):
    rewrite_bundle(converted, lambda t: t.update({_Q: -t[_Q]}))
    done = gptj("verify", "--against", "hf", "--keep-going", "--json")
    rows = done.json["levels"]["logits"]["prompts"]
    text = next(row for row in rows if row["name"] == "text")
    assert text["hidden"][0] < 1e-4 < text["hidden"][1]


# Recordings.


@pytest.fixture
def recording(hf: Path, gptj) -> Path:
    assert gptj("golden", "record", hf, "--out", "recording").code == 0
    return Path("recording")


def test_a_recording_takes_the_originals_place(recording: Path, converted: Path, gptj):
    shutil.rmtree("hf")
    done = gptj("verify", "--against-golden", recording, "--json")
    assert done.code == 0, done.stdout
    assert list(done.json["levels"]) == ["structure", "weights", "logits"]


def test_against_a_recording_the_tensor_is_named(recording: Path, converted: Path, gptj):
    rewrite_bundle(converted, lambda t: t.update({_Q: t[_Q].T.copy()}))
    done = gptj("verify", "--against-golden", recording, "--json")
    assert done.code == 3
    assert done.json["first_difference"]["tensor"]["tf"] == _Q


def test_against_a_recording_the_block_is_named(
    recording: Path, converted: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    sound = ops.gelu
    monkeypatch.setattr(layers.ops, "gelu", lambda x, approximate: sound(x, approximate=False))
    done = gptj("verify", "--against-golden", recording, "--json")
    assert done.code == 3
    assert done.json["first_difference"]["block"] == 0


def test_a_recording_of_weights_that_the_dtype_cannot_hold(recording: Path, hf: Path, gptj):
    assert gptj("convert", hf, "--to", "tf", "--dtype", "bfloat16").code == 0
    done = gptj("verify", "--against-golden", recording)
    assert done.code == 1
    assert "--dtype bfloat16" in done.stderr
    assert gptj("verify", "--against-golden", recording, "--level", "weights").code == 0
    assert gptj("golden", "record", hf, "--out", "rounded", "--dtype", "bfloat16").code == 0
    assert gptj("verify", "--against-golden", "rounded").code == 0


@pytest.mark.parametrize("name", ["recording.json", "outputs.npz"])
@pytest.mark.parametrize("damage", ["cut", "missing", "garbage"])
def test_a_damaged_recording_judges_nothing(
    name: str, damage: str, recording: Path, converted: Path, gptj
):
    path = recording / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "cut" else b"[" * 1000)
    done = gptj("verify", "--against-golden", recording)
    assert done.code == 1
    assert "recording" in done.stderr


def test_the_programs_own_recording_needs_no_pytorch(workdir: Path, gptj):
    made = json.loads((Path(golden.__path__[0]) / "tiny" / "recording.json").read_text())["made_by"]
    assert gptj(*made.split()[1:]).code == 0
    assert gptj("convert", "tinyg", "--to", "tf", "--quiet").code == 0
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from runner.cli.root import main\n"
        "sys.exit(main(['verify', '--against-golden', '--quiet']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "MATCH" in done.stdout


# The self-test.


def test_every_planted_fault_is_caught(converted: Path, gptj):
    done = gptj("verify", "--self-test", "--json")
    assert done.code == 0, done.stdout
    faults = done.json["faults"]
    assert len(faults) >= 16
    assert {fault["caught_by"] for fault in faults} == {"structure", "weights"}
    assert done.json["floor"] < 1e-5
    flipped = next(f for f in faults if "lowest bit" in f["what"])
    assert flipped["margin"] < 1
    assert sum(f["margin"] > 1 for f in faults) >= len(faults) - 2


def test_the_self_test_changes_nothing(converted: Path, gptj):
    before = {p: p.read_bytes() for p in converted.iterdir()}
    gptj("verify", "--self-test")
    assert {p: p.read_bytes() for p in converted.iterdir()} == before


def test_a_tolerance_below_the_noise_fails_the_self_test(converted: Path, gptj):
    assert gptj("verify", "--self-test", "--tolerance", "1e-9").code == 3


# The report.


def test_the_report_of_a_match(converted: Path, gptj):
    done = gptj("verify", "--report", "report.html", "--json")
    assert done.code == 0
    page = Path("report.html").read_text()
    assert '<h1 class="good">Match</h1>' in page
    assert "transformer.h.2.mlp.fc_out.weight" in page
    assert "noise floor" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_report_of_a_mismatch(converted: Path, gptj):
    rewrite_bundle(converted, lambda t: t.update({_Q: t[_Q].T.copy()}))
    done = gptj("verify", "--against", "hf", "--report", "report.html", "--keep-going")
    assert done.code == 3
    page = Path("report.html").read_text()
    assert "Mismatch" in page
    assert "the transposition was skipped" in page
    assert 'class="s6"' in page


def test_names_in_the_report_are_escaped(converted: Path, gptj):
    evil = "<script>alert(1)</script>\x1b[31m"
    rewrite_bundle(converted, lambda t: t.update({evil: np.zeros(3, np.float32)}))
    done = gptj("verify", "--against", "hf", "--report", "report.html")
    assert done.code == 3
    assert "\x1b" not in done.stdout + done.stderr
    assert "<script>alert" not in Path("report.html").read_text()


def test_a_report_that_cannot_be_written_is_refused_before_the_work(converted: Path, gptj):
    done = gptj("verify", "--report", "nowhere/report.html", "--json")
    assert done.code == 1
    assert "levels" not in done.json


@pytest.mark.parametrize(
    "options",
    [
        ("--against", "hf", "--against-golden", "recording"),
        ("--self-test", "--report", "report.html"),
        ("--against-golden", "recording", "--level", "gradients"),
    ],
)
def test_options_that_exclude_each_other(options: tuple[str, ...], converted: Path, gptj):
    assert gptj("verify", *options).code == 2
