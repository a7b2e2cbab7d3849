"""`--vocab-size`: config.json and the tensors' rows must agree, or the option chooses one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import load_tensors, make_checkpoint, save_tensors

WTE, HEAD, BIAS = "transformer.wte.weight", "lm_head.weight", "lm_head.bias"
#: Of the small checkpoint.
ROWS = 211


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _rows(folder: Path, **counts: int) -> None:
    """Cut tensors to fewer rows."""
    names = {"wte": WTE, "head": HEAD, "bias": BIAS}
    tensors = load_tensors(folder / "model.safetensors")
    tensors |= {names[k]: tensors[names[k]][:n] for k, n in counts.items()}
    save_tensors(folder / "model.safetensors", tensors)


def _refused(done, *words: str) -> None:
    assert done.code == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert not Path("converted").exists()


@pytest.mark.parametrize("stated", [200, 50400])
@pytest.mark.parametrize("tied", [False, True])
def test_a_disagreement_names_both_numbers_and_the_way_out(
    tied: bool, stated: int, workdir: Path, gptj
):
    hf = make_checkpoint(workdir / "hf", tie_word_embeddings=tied)
    _config(hf, vocab_size=stated)
    done = gptj("convert", hf, "--to", "tf")
    words = ("1 problem(s)", f"vocab_size is {stated}, but {ROWS} rows are in {WTE!r}")
    _refused(done, *words, "--vocab-size from-tensors", "never invented")
    assert (HEAD in done.stderr) is not tied
    done = gptj("convert", hf, "--to", "tf", "--vocab-size", "from-config")
    _refused(done, *words, "rows are never invented or dropped", "resize_token_embeddings")

    assert gptj("convert", hf, "--to", "tf", "--vocab-size", "from-tensors").code == 0
    assert json.loads(Path("converted/config.json").read_text())["vocab_size"] == ROWS
    assert gptj("verify", "--level", "weights").code == 0
    assert gptj("verify", "--against", "hf", "--level", "weights").code == 0


def test_the_way_back_from_a_bundle(converted: Path, gptj):
    _config(converted, vocab_size=300)
    done = gptj("convert", converted, "--to", "hf")
    assert done.code == 1
    assert "1 problem(s)" in done.stderr
    assert f"vocab_size is 300, but {ROWS} rows are in 'input_embedding/" in done.stderr
    assert "'lm_head/lm_head/kernel'" in done.stderr
    assert gptj("convert", converted, "--to", "hf", "--vocab-size", "from-tensors").code == 0
    assert gptj("verify", "converted-hf", "--level", "weights").code == 0


def test_the_choice_does_not_excuse_another_vocabulary(hf: Path, gptj):
    """verify takes the choice from the manifest, and still finds rows that differ."""
    _config(hf, vocab_size=300)
    assert gptj("convert", hf, "--to", "tf", "--vocab-size", "from-tensors").code == 0
    _rows(Path(shutil.copytree(hf, "other")), wte=200, head=200, bias=200)
    done = gptj("verify", "--against", "other", "--level", "weights", "--json")
    assert done.code == 3
    assert done.json["first_difference"]["expected"] == "vocab_size = 200"


@pytest.mark.parametrize("choice", [(), ("--vocab-size", "from-tensors")])
def test_embedding_and_head_of_different_rows(choice: tuple[str, ...], hf: Path, gptj):
    _rows(hf, wte=200)
    done = gptj("convert", hf, "--to", "tf", *choice)
    words = (f"200 in {WTE!r}, {ROWS} in {HEAD!r}, {ROWS} in {BIAS!r}", "expected the same number")
    _refused(done, "1 problem(s)", f"vocab_size is {ROWS}", *words, "resize_token_embeddings")
    assert "from-tensors" not in done.stderr


def test_other_problems_are_listed_beside_it(hf: Path, gptj):
    _config(hf, vocab_size=200)
    tensors = load_tensors(hf / "model.safetensors")
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"][:-1]
    tensors[HEAD] = np.ascontiguousarray(tensors[HEAD].T)
    save_tensors(hf / "model.safetensors", tensors)
    done = gptj("convert", hf, "--to", "tf")
    words = (f"vocab_size is 200, but {ROWS} rows are in", f"{HEAD!r} has shape [48, 211]")
    _refused(done, "3 problem(s)", *words, "'transformer.ln_f.bias' has shape [47]")
    assert "from-tensors" not in done.stderr


def test_a_model_without_tokens(hf: Path, gptj):
    _rows(hf, wte=0, head=0, bias=0)
    done = gptj("convert", hf, "--to", "tf", "--vocab-size", "from-tensors")
    assert done.code == 2
    assert "vocab_size is 0" in done.stderr


def test_an_agreement_needs_no_choice(hf: Path, gptj):
    for choice in ("from-tensors", "from-config"):
        out = ("--out", choice)
        assert gptj("convert", hf, "--to", "tf", "--vocab-size", choice, *out).code == 0
        assert gptj("verify", choice, "--level", "weights").code == 0


@pytest.mark.parametrize("value", ['"from-nowhere"', "[1]", "7", "{}"])
def test_a_manifest_with_another_choice(value: str, converted: Path, gptj):
    path = converted / "manifest.json"
    text = path.read_text()
    assert '"vocab_size": null' in text
    path.write_text(text.replace('"vocab_size": null', f'"vocab_size": {value}'))
    assert gptj("verify", "--level", "weights").code == 0
