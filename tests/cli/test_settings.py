"""Settings beside the weights: where texts end, chat templates, and fields that others read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gptj_convert.formats.layouts import cs
from tests.cli.fake_hub import REPOSITORY, FakeHub, point_at, serving
from tests.conftest import GOLDEN_RUNS, make_checkpoint, write_records
from tests.small_tokenizer import END_ID, write_vocabulary

#: A chat fine-tune's, with whatever transformers has written into config.json over the years.
CONFIG: dict[str, Any] = {
    "eos_token_id": [264, END_ID],
    "bos_token_id": END_ID,
    "pad_token_id": 263,
    "use_cache": False,
    "initializer_range": 0.5,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.30.0",
    "torch_dtype": "float16",
    "rotary": True,
    "scale_attn_weights": True,
    "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1},
    "a_field_of_mine": [{"deep": None}, 1.5],
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
FILES = {
    "tokenizer_config.json": {
        "added_tokens_decoder": {
            str(END_ID): {"content": "<|endoftext|>", "special": True},
            "263": {"content": "<|im_start|>", "special": True},
            "264": {"content": "<|im_end|>", "special": True},
            "265": {"content": " wow", "lstrip": True},
        },
        "eos_token": "<|im_end|>",
    },
    "generation_config.json": {"eos_token_id": [264, END_ID], "temperature": 0.5, "mine": [1]},
    "chat_template.jinja": TEMPLATE,
    "chat_template.json": {"chat_template": TEMPLATE},
    "additional_chat_templates/tools.jinja": f"{TEMPLATE} tools",
}


@pytest.fixture
def chat(workdir: Path) -> Path:
    """A chat fine-tune at ./hf."""
    return make_chat(workdir / "hf")


def make_chat(folder: Path, **fields: Any) -> Path:
    make_checkpoint(folder, vocab_size=300, bos_token_id=END_ID, eos_token_id=END_ID)
    write_vocabulary(folder)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return change_config(folder, **CONFIG | fields)


def change_config(folder: Path, **fields: Any) -> Path:
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def config_of(folder: str | Path) -> dict[str, Any]:
    """Return what transformers reads, without what it adds itself."""
    values = AutoConfig.from_pretrained(folder).to_dict()
    bookkeeping = ("dtype", "transformers_version", "_name_or_path")
    return {k: v for k, v in values.items() if k not in bookkeeping}


WAYS = {
    "tf": [("tf", "converted")],
    "keras": [("keras", "converted-keras")],
    "cs": [("cs", "converted-cs")],
    "hf": [],
    "all": [("tf", "converted"), ("keras", "converted-keras"), ("cs", "converted-cs")],
}


@pytest.mark.parametrize("way", WAYS)
def test_settings_survive_the_round_trip(way: str, chat: Path, gptj):
    source: str | Path = chat
    for target, out in WAYS[way]:
        assert gptj("convert", source, "--to", target).code == 0
        source = out
    assert gptj("convert", source, "--to", "hf", "--out", "back").code == 0
    back = Path("back")
    for name in (*FILES, "vocab.json", "merges.txt"):
        assert (back / name).read_bytes() == (chat / name).read_bytes(), name
    assert config_of(back) == config_of(chat)
    written = json.loads((back / "config.json").read_text())
    assert {k: written[k] for k in CONFIG if k != "torch_dtype"} == {
        k: v for k, v in CONFIG.items() if k != "torch_dtype"
    }
    assert "torch_dtype" not in written
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(p).generation_config.to_dict() for p in (back, chat)
    )
    assert ours == theirs
    template = [{"role": "user", "content": "hello"}]
    ids = [
        AutoTokenizer.from_pretrained(p).apply_chat_template(template)["input_ids"]
        for p in (back, chat)
    ]
    assert ids[0] == ids[1]
    assert gptj("verify", "back", "--level", "weights").code == 0
    assert gptj("inspect", "back", "--check").code == 0


def test_settings_in_config_json_alone_survive_the_round_trip(chat: Path, gptj):
    """There is no generation_config.json, which would hide them, and none is written."""
    (chat / "generation_config.json").unlink()
    assert gptj("convert", chat, "--to", "tf").code == 0
    assert gptj("convert", "converted", "--to", "hf").code == 0
    assert not Path("converted-hf/generation_config.json").exists()
    found, expected = (
        AutoModelForCausalLM.from_pretrained(p).generation_config for p in ("converted-hf", chat)
    )
    assert found.to_dict() == expected.to_dict()
    assert (found.eos_token_id, found.temperature, found.do_sample) == ([264, END_ID], 0.7, True)


def test_a_run_keeps_the_settings_of_what_it_began_with(chat: Path, gptj):
    rows = np.ones((4, 3, 16), np.int64)
    Path("data").mkdir()
    write_records(Path("data/a.tfrecord"), rows)
    documents = {"LICENSE": b"All yours.\r\n", "README.md": b"---\nlicense: mit\n---\nOurs.\n"}
    for name, content in documents.items():
        (chat / name).write_bytes(content)
    assert gptj("convert", chat, "--to", "tf").code == 0
    Path("model_dir").mkdir()
    Path("model_dir/README.md").write_bytes(b"What I want to try.\n")
    done = gptj(
        "train", "--init-from", "converted", "--max-steps", 1, "--quiet",
        *("--set", "train_input.batch_size=2", "--set", "train_input.max_sequence_length=16"),
        *("--set", "eval_input.max_sequence_length=16"),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert gptj("convert", "model_dir", "--to", "hf").code == 0
    assert config_of("converted-hf") == config_of(chat)
    for name in (*FILES, "LICENSE"):
        assert (Path("converted-hf") / name).read_bytes() == (chat / name).read_bytes()
    # What the user has written in the run's folder stays.
    assert Path("model_dir/README.md").read_bytes() == b"What I want to try.\n"
    assert Path("converted-hf/README.md").read_text().endswith("What I want to try.\n")


def test_what_is_not_carried_is_named(chat: Path, gptj):
    change_config(chat, auto_map={"AutoModel": "mine.Mine"}, quantization_config={"bits": 8})
    for name in ("modeling_mine.py", "trainer_state.json", "notes.md", ".hidden.json"):
        (chat / name).write_text("{}")
    done = gptj("convert", chat, "--to", "tf")
    assert done.code == 0
    assert "note: not carried: modeling_mine.py, trainer_state.json\n" in done.stderr
    assert "config.json: auto_map is not carried: it names program code" in done.stderr
    assert "config.json: quantization_config is not carried: the weights" in done.stderr
    written = json.loads(Path("converted/config.json").read_text())
    assert not {"auto_map", "quantization_config"} & written.keys()
    again = gptj("convert", "converted", "--to", "hf")
    assert "not carried" not in again.stderr


def test_a_config_with_two_names_of_one_field(chat: Path, gptj):
    before = config_of(chat)
    change_config(chat, hidden_size=48, num_hidden_layers=3)
    assert gptj("convert", chat, "--to", "hf", "--out", "back").code == 0
    assert config_of("back") == before
    change_config(chat, hidden_size=96)
    refused = gptj("convert", chat, "--to", "tf")
    assert refused.code == 2
    assert "n_embd is 48, but its alias hidden_size is 96" in refused.stderr


@pytest.mark.parametrize("ends", ["5", [1, "2"], [[1]], 1.5, True])
def test_an_end_that_is_no_token_is_refused(ends: Any, chat: Path, gptj):
    generation = json.dumps({"eos_token_id": ends})
    (chat / "generation_config.json").write_text(generation)
    refused = gptj("generate", "--model", chat, "--prompt", "hello", "--max-new-tokens", 1)
    assert refused.code == 2
    assert f"eos_token_id is {ends!r}, expected a token id, a list of them or" in refused.stderr
    change_config(chat, eos_token_id=ends)
    refused = gptj("convert", chat, "--to", "tf")
    assert refused.code == 2
    assert "config.json: eos_token_id is" in refused.stderr


# What `gptj generate` makes of them.


def generated(folder: Path, ids: list[int], new: int) -> list[int]:
    """Return what transformers generates greedily, without the final token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = model.generation_config.eos_token_id
    found = model.generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0
    )[0].tolist()
    ends = ends if isinstance(ends, list) else [ends]
    return found[:-1] if len(found) > len(ids) and found[-1] in ends else found


@pytest.mark.parametrize("case", ["both", "only config", "no end", "generation null", "one"])
def test_generate_stops_where_transformers_does(case: str, chat: Path, gptj):
    prompt = [5, 7, 1, 9]
    generation = chat / "generation_config.json"
    for key in ("do_sample", "temperature", "top_p"):
        change_config(chat, **{key: None})
    generation.write_text("{}")
    whole = generated(chat, prompt, 24)
    new = whole[len(prompt) :]
    assert len(new) == 24
    # A token that comes for the first time late, between two that never come.
    late = next(t for n, t in enumerate(new) if n >= 4 and t not in new[:n] and 0 < t < 299)
    never = [t for t in range(300) if t not in new]
    ends = [next(t for t in never if t < late), late, next(t for t in never if t > late)]
    change_config(chat, eos_token_id=ends if case == "only config" else [new[0]])
    if case == "only config":
        generation.unlink()
    else:
        stated = {"both": {"eos_token_id": ends}, "generation null": {"eos_token_id": None}}
        stated |= {"no end": {}, "one": {"eos_token_id": late}}
        generation.write_text(json.dumps(stated[case]))
    expected = generated(chat, prompt, 24)
    assert (len(expected) < len(whole)) == (case not in ("no end", "generation null"))
    for more in ((), ("--execution", "streaming")):
        done = gptj(
            *("generate", "--model", chat, "--ids", ",".join(map(str, prompt))),
            *("--max-new-tokens", 24, "--json", *more),
        )
        assert done.json["ids"] == expected


def test_a_chat_prompt_is_read_as_transformers_reads_it(chat: Path, gptj):
    prompts = ["<|im_start|>hello <|im_end|>\u00a0 wow<|endoftext|>hell", "plain"]
    tokenizer = AutoTokenizer.from_pretrained(chat)
    Path("prompts.txt").write_text("\n".join(prompts))
    one = [
        gptj("generate", "--model", chat, "--prompt", p, "--max-new-tokens", 3, "--json").json
        for p in prompts
    ]
    many = gptj("generate", "--model", chat, "--prompts", "prompts.txt", "--max-new-tokens", 3,
                "--json").json["continuations"]  # fmt: skip
    for prompt, single, of_many in zip(prompts, one, many, strict=True):
        ids = tokenizer(prompt).input_ids
        assert single["ids"][: len(ids)] == ids
        assert single["ids"] == of_many["ids"]
        assert single["text"] == of_many["text"] == tokenizer.decode(single["ids"])
    assert one[0]["ids"][:2] == [263, 259]


# What `gptj data` makes of them.

DOCUMENT = "<|im_start|>hello  wow<|endoftext|>"


def _records(folder: str) -> list[list[int]]:
    import tensorflow as tf

    found = []
    for path in sorted(Path(folder).glob("*.tfrecord")):
        for raw in tf.data.TFRecordDataset(str(path)):
            example = tf.train.Example.FromString(raw.numpy())
            found.append(list(example.features.feature["input_ids"].int64_list.value))
    return found


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["text", "pile"])
def test_records_have_the_ids_of_transformers(kind: str, special: bool, chat: Path, gptj):
    tokenizer = AutoTokenizer.from_pretrained(chat)
    if kind == "text":
        Path("a.txt").write_text(DOCUMENT)
    else:
        Path("a.jsonl").write_text(json.dumps({"text": DOCUMENT}))
    done = gptj(
        *("data", kind, "a.txt" if kind == "text" else "a.jsonl", "--tokenizer", chat),
        *("--max-sequence-length", 64, "--processes", 1, "--json"),
        *(["--allow-special"] if special else []),
    )
    assert done.code == 0, done.stderr
    ids = tokenizer(DOCUMENT, split_special_tokens=not special).input_ids
    (row,) = _records("data")
    assert row[: len(ids)] == ids
    assert set(row[len(ids) :]) == {tokenizer.eos_token_id}
    assert (263 in ids) == special


@pytest.mark.parametrize("special", [False, True])
def test_summaries_have_the_ids_of_transformers(special: bool, workdir: Path, gptj):
    from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer

    folder = workdir / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "gptj"}')
    added = json.loads((folder / "added_tokens.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps(added | {"<|im_end|>": 50400}))
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<|im_end|>"}')
    tokenizer = AutoTokenizer.from_pretrained(folder)
    article, summary = "A long article<|im_end|> of <|extratoken_9|> and more", "short<|endoftext|>"
    Path("a.jsonl").write_text(json.dumps({"article": article, "summary": summary}))
    done = gptj(
        *("data", "summarization", "a.jsonl", "--tokenizer", folder, "--processes", 1),
        *("--max-sequence-length", 64, *(["--allow-special"] if special else [])),
    )
    assert done.code == 0, done.stderr
    texts = (tokenizer(t, split_special_tokens=not special).input_ids for t in (article, summary))
    first, second = texts
    (row,) = _records("data")
    expected = [50256, *first, 50257, *second]
    assert row[: len(expected)] == expected
    arguments = json.loads(Path("data/data_params.json").read_text())["arguments"]
    assert arguments["allow_special"] == special


def test_a_note_of_the_tokenizer_is_printed(chat: Path, gptj):
    (chat / "tokenizer_config.json").unlink()
    (chat / "added_tokens.json").write_text('{"<x>": 280}')
    Path("a.txt").write_text("hello<x>")
    said = "the token '<x>' has the id 280 in a file and gets the id 263, as in transformers"
    for call in (
        ("generate", "--model", chat, "--prompt", "hello<x>", "--max-new-tokens", 1),
        ("data", "text", "a.txt", "--tokenizer", chat, "--max-sequence-length", 8),
    ):
        assert said in gptj(*call).stderr
    (chat / "added_tokens.json").write_text('{"<x>": 300}')
    assert (
        "note: added_tokens.json has ids up to 300, but the model has only 300 rows"
        in gptj("convert", chat, "--to", "tf").stderr
    )
    (chat / "added_tokens.json").write_text('{"<x>": "300"}')
    refused = gptj("generate", "--model", chat, "--prompt", "x", "--max-new-tokens", 1)
    assert refused.code == 1
    assert "added_tokens.json: '<x>': the id is '300', expected a whole number" in refused.stderr
    by_ids = gptj("generate", "--model", chat, "--ids", "5,6", "--max-new-tokens", 1)
    assert by_ids.code == 0
    assert "the id is '300'" in by_ids.stderr


# Where nothing says where texts end.


def test_a_bundle_with_a_yaml_alone_ends_its_texts(workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf", vocab_size=50400, n_layer=1)
    assert gptj("convert", hf, "--to", "tf").code == 0
    for name in ("config.json", "generation_config.json", "manifest.json"):
        Path("converted", name).unlink()
    done = gptj("convert", "converted", "--to", "hf")
    assert done.code == 0
    assert "says where texts end: end-of-text does, token 50256" in done.stderr
    _ends_at("converted-hf", 50256)
    assert "where texts end" not in gptj("convert", "converted-hf", "--to", "tf", "--force").stderr


def test_a_client_s_file_with_a_yaml_alone_ends_its_texts(workdir: Path, gptj):
    hf = make_checkpoint(workdir / "hf", vocab_size=50257, n_layer=1)
    assert gptj("convert", hf, "--to", "cs").code == 0
    for path in Path("converted-cs").glob("*.json"):
        path.unlink()
    assert {p.name for p in Path("converted-cs").iterdir()} == {cs.MODEL_FILE, "trainer.yaml"}
    assert gptj("convert", "converted-cs", "--to", "hf").code == 0
    _ends_at("converted-hf", 50256)


def test_a_run_from_random_weights_ends_its_texts(workdir: Path, gptj):
    Path("data").mkdir()
    write_records(Path("data/a.tfrecord"), np.ones((4, 3, 16), np.int64))
    hf = make_checkpoint(workdir / "hf", vocab_size=50400, n_layer=1)
    assert gptj("convert", hf, "--to", "tf").code == 0
    shutil.move("converted/params.yaml", "params.yaml")
    done = gptj(
        "train", "--params", "params.yaml", "--max-steps", 1, "--quiet",
        *("--set", "train_input.batch_size=2", "--set", "train_input.max_sequence_length=16"),
        *("--set", "eval_input.max_sequence_length=16"),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    _ends_at("model_dir", 50256)
    assert gptj("convert", "model_dir", "--to", "hf").code == 0
    _ends_at("converted-hf", 50256)


def test_a_vocabulary_without_that_token_has_no_end(workdir: Path, gptj):
    shutil.copytree(GOLDEN_RUNS / "adamw", "run")
    assert json.loads(Path("run/hf/config.json").read_text())["vocab_size"] <= 50256
    done = gptj("convert", "run/tf_model.ckpt", "--to", "hf")
    assert done.code == 0
    assert "says where texts end: nothing ends them" in done.stderr
    _ends_at("converted-hf", None)


def _ends_at(folder: str, end: int | None) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id) == (end, end)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (end, end)


# What `gptj download` fetches.


def test_settings_are_downloaded(workdir: Path, monkeypatch: pytest.MonkeyPatch, gptj):
    made = make_chat(workdir / "made")
    hub = FakeHub(
        {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    )
    hub.files |= {"README.md": b"x", "LICENSE": b"x", "Notice.txt": b"x"}
    wanted = set(hub.files)
    hub.files |= {"modeling_mine.py": b"x", "deep/config.json": b"{}"}
    hub.files["additional_chat_templates/more/x.jinja"] = b"x"
    with serving(hub) as endpoint:
        point_at(endpoint, monkeypatch)
        done = gptj("download", REPOSITORY, "--out", "fetched")
    assert done.code == 0, done.stderr
    fetched = Path("fetched")
    names = {p.relative_to(fetched).as_posix() for p in fetched.rglob("*") if p.is_file()}
    assert names - {".gptj-download.json"} == wanted
    assert "note: not fetched: modeling_mine.py\n" in done.stderr
    assert gptj("inspect", fetched, "--check").code == 0
    assert gptj("convert", fetched, "--to", "tf").code == 0
    assert Path("converted/additional_chat_templates/tools.jinja").exists()
