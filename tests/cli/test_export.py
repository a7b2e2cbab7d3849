"""`gptj export saved-model`: the model as TensorFlow alone runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptj_convert.resources import machine
from gptj_model.serving import served_model
from runner import api
from tests.conftest import Outcome, make_checkpoint

#: Several tokens that end a text, so that sampled texts end at different places.
ENDS = [5, 17, 29, 43, 60, 71, 88, 99, 120, 150]
PROMPTS = [[1, 2, 3, 4, 6], [9], [100, 101, 102], [50, 61], [7] * 20]
NEW = 30
ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "seed": 11},
    {"temperature": 1.3, "top_p": 0.9, "seed": 2**33},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.5, "seed": 3},
    {"temperature": 1.0, "top_k": 10_000, "top_p": 1e-6, "seed": 4},
]
#: What no request may ask, and the words of the error.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens is below 1"),
    ({"max_new_tokens": 2048}, "together more than 64 tokens"),
    ({"temperature": -1.0}, "temperature is not 0 or more"),
    ({"top_p": 0.0}, "top_p is not above 0"),
    ({"top_k": -1}, "top_k is below 0"),
    ({"seed": -1}, "seed is below 0"),
    ({"lengths": [6, 1, 3, 2, 23]}, "lengths holds a number"),
    ({"lengths": [5, 1]}, "lengths has not one number"),
    ({"ids": [[211]] * 5, "lengths": [1] * 5}, "an id beyond 0 to 210"),
]

#: A program in which TensorFlow alone can be imported: neither this project nor Keras.
ALONE = """
import json, os, sys
for name in ("gptj_model", "gptj_convert", "golden", "runner", "keras", "tf_keras", "torch"):
    sys.modules[name] = None
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
import tensorflow as tf
asked = json.load(sys.stdin)
DTYPES = {"ids": tf.int32, "lengths": tf.int32, "max_new_tokens": tf.int32, "top_k": tf.int32,
          "temperature": tf.float32, "top_p": tf.float32, "seed": tf.int64}
loaded = tf.saved_model.load(asked["path"])
generate, serve = (loaded.signatures[name] for name in ("generate", "serve"))
found = {"texts": [], "errors": []}
for request in asked["requests"]:
    made = generate(**{k: tf.constant(v, DTYPES[k]) for k, v in request.items()})
    rows = zip(made["new_ids"].numpy(), made["new_lengths"].numpy())
    found["texts"].append([row[:n].tolist() for row, n in rows])
for request in asked["refused"]:
    try:
        generate(**{k: tf.constant(v, DTYPES[k]) for k, v in request.items()})
        found["errors"].append("")
    except tf.errors.InvalidArgumentError as e:
        found["errors"].append(str(e))
found["logits"] = serve(ids=tf.constant(asked["ids"]))["logits"].numpy().tolist()
found["variables"] = sorted({v.dtype.name for v in loaded.weights})
print(json.dumps(found))
"""


def _request(**fields: Any) -> dict[str, Any]:
    """A request for all prompts, padded on the right with a token that must not matter."""
    longest = max(map(len, PROMPTS)) + 2
    defaults = {
        "ids": [[*prompt, *[13] * (longest - len(prompt))] for prompt in PROMPTS],
        "lengths": [len(prompt) for prompt in PROMPTS],
        "max_new_tokens": NEW, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0,
    }  # fmt: skip
    return defaults | fields


@pytest.fixture
def hf(workdir: Path) -> Path:
    return make_checkpoint(workdir / "hf", eos_token_id=tuple(ENDS), bos_token_id=0)


def _run_alone(path: Path, where: Path) -> dict[str, Any]:
    asked = {
        "path": str(path.absolute()),
        "requests": [_request(**fields) for fields in ASKED],
        "refused": [_request(**fields) for fields, _ in REFUSED],
        "ids": PROMPTS[:1],
    }
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, cwd=where
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _generated(gptj: Callable[..., Outcome]) -> Iterator[list[list[int]]]:
    """Yield what `gptj generate` continues the prompts with, for each of `ASKED`."""
    lines = [json.dumps({"ids": prompt}) for prompt in PROMPTS]
    Path("prompts.jsonl").write_text("\n".join(lines) + "\n")
    for fields in ASKED:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
        done = gptj(
            "generate", "--model", "hf", "--prompts", "prompts.jsonl", "--max-new-tokens", NEW,
            *options, "--json",
        )  # fmt: skip
        assert done.code == 0, done.stderr
        rows = done.json["continuations"]
        yield [r["ids"][len(p) :] for r, p in zip(rows, PROMPTS, strict=True)]


def test_tensorflow_alone_writes_what_generate_writes(hf: Path, tmp_path: Path, gptj):
    done = gptj("export", "saved-model", hf, "--out", "out", "--max-length", 64, "--json")
    assert done.code == 0, done.stderr
    assert done.json["signatures"] == ["serve", "generate"]
    assert done.json["stop_tokens"] == ENDS
    (tmp_path / "elsewhere").mkdir()
    found = _run_alone(Path("out"), tmp_path / "elsewhere")
    texts = list(_generated(gptj))
    assert found["texts"] == texts
    lengths = {len(text) for of_request in texts for text in of_request}
    assert max(lengths) == NEW
    assert len(lengths) > 5  # texts that end, at different places
    for error, (_, words) in zip(found["errors"], REFUSED, strict=True):
        assert words in error
    expected = np.asarray(api.load_model(hf)(np.array(PROMPTS[:1])))
    np.testing.assert_allclose(found["logits"], expected, rtol=1e-5, atol=1e-5)
    assert found["variables"] == ["float32"]


def test_sixteen_bits(hf: Path, tmp_path: Path, gptj):
    assert gptj("export", "saved-model", hf, "--out", "out", "--dtype", "bfloat16").code == 0
    found = _run_alone(Path("out"), tmp_path)
    assert found["variables"] == ["bfloat16"]
    expected = np.asarray(api.load_model(hf, dtype="bfloat16")(np.array(PROMPTS[:1])), np.float32)
    assert np.abs(found["logits"] - expected).max() < 0.1 * expected.std()


def test_what_is_written(workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf", vocab_size=50400, n_layer=1)
    assert gptj("export", "saved-model", hf, "--out", "out").code == 0
    files = {str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file()}
    extra = {f"assets.extra/{p.name}" for p in hf.iterdir() if p.suffix in (".json", ".txt")}
    assert files == extra | {
        "saved_model.pb", "fingerprint.pb", "variables/variables.index",
        "variables/variables.data-00000-of-00001",
    }  # fmt: skip
    # Weights are variables, not constants, of which a graph holds 2 GB at most.
    assert Path("out/saved_model.pb").stat().st_size < 2_000_000 < 4 * 50400 * 48
    again = gptj("export", "saved-model", hf, "--out", "out")
    assert again.code == 2
    assert "already exists" in again.stderr
    assert "--force would delete" not in again.stderr  # every file is one that this program writes
    assert gptj("export", "saved-model", hf, "--out", "out", "--force").code == 0
    assert not list(Path().glob("*.partial*"))


def test_a_dry_run_writes_nothing(hf: Path, gptj):
    done = gptj("export", "saved-model", hf, "--out", "out", "--dry-run", "--json")
    assert done.code == 0
    assert done.json["disk_bytes"] == 4 * sum(
        p.size for p in api.load_model(hf).weights for p in [p.value.numpy()]
    )
    assert done.json["planned_rss_bytes"] > done.json["disk_bytes"]
    assert not Path("out").exists()


def test_an_interruption_leaves_nothing(hf: Path, gptj, monkeypatch: pytest.MonkeyPatch):
    sound = served_model.save

    def save(*arguments: Any) -> None:
        sound(*arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(served_model, "save", save)
    assert gptj("export", "saved-model", hf, "--out", "out").code == 130
    assert sorted(p.name for p in Path().iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("nowhere",), 1, "not found, expected a checkpoint"),
        (("hf", "--out", "hf"), 2, "is the source itself"),
        (("hf", "--out", "hf/inside"), 2, "lies inside the source"),
        (("hf", "--max-length", "1"), 2, "expected 2 to the model's 2048 positions"),
        (("hf", "--max-length", "2049"), 2, "expected 2 to the model's 2048 positions"),
        (("hf", "--dtype", "int8"), 2, "int8"),
    ],
)
def test_what_cannot_be_exported(options: tuple[str, ...], code: int, words: str, hf: Path, gptj):
    done = gptj("export", "saved-model", *options)
    assert done.code == code, done.stderr
    assert words in " ".join(done.stderr.split())


def test_too_little_memory_is_known_before_the_weights_are_read(
    hf: Path, gptj, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "memory_total", lambda: 500_000_000)
    done = gptj("export", "saved-model", hf, "--out", "out")
    assert done.code == 1
    assert "this machine has 0.50 GB" in done.stderr
    assert "--dtype bfloat16" in done.stderr
    assert not Path("out").exists()
