"""The model card that `gptj convert --to hf` writes, and the licenses that every conversion
carries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.cli.fake_hub import COMMIT, REPOSITORY, FakeHub, client_alone, point_at, serving

RESULTS = [
    {
        "name": "small",
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": "lambada", "name": "LAMBADA"},
                "metrics": [{"type": "accuracy", "value": 0.5}],
            }
        ],
    }
]
METADATA = {
    "language": ["no", "en"],
    "license": "apache-2.0",
    "datasets": ["EleutherAI/pile"],
    "tags": ["causal-lm"],
    "model-index": RESULTS,
}
TEXT = "# A small one\n\nIts {{ braces }} and | pipes | stay.\n"
CARD = f"---\n{json.dumps(METADATA)}\n---\n{TEXT}"
#: Bytes that no text would survive.
LICENSES = {"LICENSE.txt": b"All yours.\r\n\xff", "Notice": b"\x00", "COPYING": b"as it is"}


@pytest.fixture
def carded(hf: Path) -> Path:
    """./hf with a card and licenses."""
    (hf / "README.md").write_text(CARD)
    for name, content in LICENSES.items():
        (hf / name).write_bytes(content)
    return hf


def card(folder: Path | str) -> tuple[dict[str, Any], str]:
    """The metadata of a folder's card, as the hub's library reads it, and the card's text."""
    found = ModelCard.load(Path(folder) / "README.md")
    return found.data.to_dict(), found.text


@pytest.mark.parametrize("way", ["tf", "keras", "cs", "hf"])
def test_card_and_licenses_survive_a_round_trip(way: str, carded: Path, gptj):
    assert gptj("convert", carded, "--to", way, "--out", "there").code == 0
    if way != "hf":
        assert Path("there/README.md").read_text() == CARD
    done = gptj("convert", "there", "--to", "hf", "--out", "back")
    assert done.code == 0
    assert "no license" not in done.stderr
    for folder in (Path("there"), Path("back")):
        for name, content in LICENSES.items():
            assert (folder / name).read_bytes() == content
    metadata, text = card("back")
    assert metadata == METADATA | {
        "tags": ["causal-lm", "gptj"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert text.endswith(TEXT)
    assert "Every tensor keeps its dtype and its values." in text
    for name in LICENSES:
        assert f"[{name}]({name})" in text
    assert text.count("## Verification") == 1
    assert gptj("inspect", "back", "--check").code == 0


def test_a_conversion_writes_the_same_card_wherever_it_writes(carded: Path, gptj):
    carded = carded.rename("a|`b\n")
    for out in ("a", "b/c"):
        assert gptj("convert", carded, "--to", "hf", "--out", out).code == 0
    assert "| Converted from | `a??b?`, a checkpoint of" in card("a")[1]
    assert Path("a/README.md").read_bytes() == Path("b/c/README.md").read_bytes()
    assert "/" not in card("a")[1].partition("`gptj convert ")[2].partition("`")[0]


def test_the_card_may_be_edited_and_a_license_may_not(carded: Path, gptj):
    assert gptj("convert", carded, "--to", "hf").code == 0
    written = Path("converted-hf/README.md").read_text()
    Path("converted-hf/README.md").write_text(written.replace(TEXT, "My own.\n"))
    checked = gptj("inspect", "converted-hf", "--check")
    assert checked.code == 0
    assert "README.md" not in checked.stdout
    assert gptj("convert", "converted-hf", "--to", "tf").code == 0
    # A card that speaks of files of Hugging Face's format would be wrong there.
    assert card("converted")[1].strip() == "My own."
    assert gptj("convert", "converted", "--to", "hf", "--out", "again").code == 0
    metadata, text = card("again")
    assert metadata["license"] == "apache-2.0"
    assert text.endswith("My own.\n")
    Path("converted-hf/Notice").write_bytes(b"changed")
    assert gptj("inspect", "converted-hf", "--check").code == 3
    refused = gptj("convert", carded, "--to", "hf")
    assert refused.code == 2
    assert "--force" in refused.stderr
    assert "My own" in Path("converted-hf/README.md").read_text()


def test_no_license_is_invented(hf: Path, gptj):
    done = gptj("convert", hf, "--to", "hf")
    assert done.code == 0
    note = "note: the source's card names no license: the written README.md names none"
    assert note in done.stderr
    metadata, text = card("converted-hf")
    assert metadata == {
        "tags": ["gptj"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert "The card of the source names no license, so this one names none." in text
    assert "no license" not in gptj("convert", hf, "--to", "tf").stderr
    (hf / "LICENCE").write_text("Ours.")
    done = gptj("convert", hf, "--to", "hf", "--force")
    assert "names no license; see LICENCE: the written README.md names none" in done.stderr


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"---\nlicense: [mit\n---\ntext\n", "it is not valid YAML: "),
        (b"---\n- mit\n---\ntext\n", "it is not a mapping of names"),
        (b"---\n1: mit\n---\ntext\n", "it is not a mapping of names"),
        (b"---\nlicense: !!python/name:os.system\n---\ntext\n", "it is not valid YAML: "),
        (b"---\n" + b"a: {" * 3000 + b"\n---\ntext\n", "it is not valid YAML: "),
        (b"\xff\xfe text\n", "it is not UTF-8: "),
        (b"x" * (2**20 + 1), "it has 1048577 bytes, expected at most 1048576"),
    ],
)
def test_a_card_that_cannot_be_read_is_named(content: bytes, fault: str, hf: Path, gptj):
    (hf / "README.md").write_bytes(content)
    done = gptj("convert", hf, "--to", "hf")
    assert done.code == 0, done.stderr
    assert f"note: README.md: its metadata is not kept: {fault}" in done.stderr
    metadata, text = card("converted-hf")
    assert "license" not in metadata
    assert (content.isascii() and len(content) < 2**20) == text.endswith("text\n")


# Where the weights come from.


@pytest.fixture
def from_hub(carded: Path, monkeypatch: pytest.MonkeyPatch, gptj) -> Iterator[Path]:
    """./hf as it is after a download."""
    hub = FakeHub({p.name: p.read_bytes() for p in carded.iterdir()})
    shutil.rmtree(carded)
    with client_alone(carded.with_name("home"), monkeypatch), serving(hub) as endpoint:
        point_at(endpoint, monkeypatch)
        assert gptj("download", REPOSITORY, "--out", carded).code == 0
        yield carded


def test_the_repository_is_named_after_every_conversion(from_hub: Path, gptj):
    assert gptj("convert", from_hub, "--to", "hf").code == 0
    assert f"`gptj convert {REPOSITORY}@{COMMIT} --to hf`" in card("converted-hf")[1]
    assert gptj("convert", from_hub, "--to", "tf").code == 0
    assert gptj("convert", from_hub, "--to", "cs", "--dtype", "float16").code == 0
    shutil.rmtree(from_hub)
    assert gptj("convert", "converted", "--to", "hf", "--out", "back").code == 0
    for folder in ("converted-hf", "back"):
        metadata, text = card(folder)
        assert metadata["base_model"] == REPOSITORY
        # The hub knows no relation for the same values.
        assert "base_model_relation" not in metadata
        assert metadata["model-index"] == RESULTS
        assert f"at commit {COMMIT}" in text
        assert f"Its weights are those of {REPOSITORY}." in text
    # What was rounded once stays so, whatever the dtype is later.
    done = gptj("convert", "converted-cs", "--to", "hf", "--out", "rounded", "--dtype", "float32")
    assert "note: README.md: the evaluation results in the source's card (model-index)" in (
        done.stderr
    )
    metadata, text = card("rounded")
    assert metadata["base_model_relation"] == "quantized"
    assert "model-index" not in metadata
    assert f"are those of {REPOSITORY}, rounded to a narrower dtype" in text
    assert "Tensors of float16 became float32, without loss." in text


def test_an_origin_that_was_tampered_with_is_no_manifest(from_hub: Path, gptj):
    assert gptj("convert", from_hub, "--to", "tf").code == 0
    path = Path("converted/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["origin"] == {"repository": REPOSITORY, "commit": COMMIT}
    for origin in ({"repository": "x"}, {"relation": "friend"}, {"more": 1}, {"step": "2"}, [1]):
        path.write_text(json.dumps(manifest | {"origin": origin}))
        checked = gptj("inspect", "converted", "--check")
        assert checked.code == 3, origin
        assert "is not a manifest of this program" in checked.stdout


@pytest.mark.parametrize("golden_run", ["adamw"], indirect=True)
def test_a_run_is_named_with_its_step_and_data(golden_run: Path, gptj):
    shutil.copy("params.yaml", "ckpt")
    config = json.loads(Path("hf/config.json").read_text())
    Path("ckpt/config.json").write_text(json.dumps(config | {"_name_or_path": "me/base"}))
    Path("ckpt/README.md").write_text(CARD)
    Path("raw").mkdir()
    record = {"repository": "me/texts", "revision": None, "commit": COMMIT, "files": {}}
    Path("raw/.gptj-download.json").write_text(json.dumps(record | {"kind": "dataset"}))
    Path("records/data_params.json").write_text(json.dumps({"sources": {"raw/a.jsonl": 5}}))
    source = Path("ckpt/model.ckpt-20")
    assert gptj("convert", source, "--to", "hf", "--out", "direct").code == 0
    assert gptj("convert", source, "--to", "tf", "--out", "tf").code == 0
    assert gptj("convert", "tf", "--to", "hf", "--out", "by-way").code == 0
    for folder in ("direct", "by-way"):
        metadata, text = card(folder)
        assert metadata["base_model"] == "me/base"
        assert metadata["base_model_relation"] == "finetune"
        assert metadata["datasets"] == ["EleutherAI/pile", "me/texts"]
        assert "model-index" not in metadata
        assert "It was trained from me/base." in text
        assert "| Trained with | gptj, up to step 20 |" in text
        assert "| Training records | `records` |" in text
    Path("params.yaml").write_text("[")
    Path("ckpt/params.yaml").write_text("[")
    assert gptj("convert", source, "--to", "hf", "--force", "--out", "direct").code == 0
    assert "Training records" not in card("direct")[1]


def test_every_option_is_in_the_command_of_the_card(hf: Path, gptj):
    options = ("--dtype", "bfloat16", "--max-shard-size", "200KB", "--saturate")
    assert gptj("convert", hf, "--to", "hf", *options).code == 0
    text = card("converted-hf")[1]
    assert "`gptj convert hf --to hf --dtype bfloat16 --max-shard-size 200000 --saturate`" in text
    line = text.partition("`gptj ")[2].partition("`")[0].split()
    assert gptj(*line, "--out", "again").code == 0
    for name in ("README.md", "manifest.json", "model.safetensors.index.json"):
        assert Path("again", name).read_bytes() == Path("converted-hf", name).read_bytes()
