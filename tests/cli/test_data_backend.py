"""`gptj data` with and without gigatoken: the same records, and a difference is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from runner.data.making import build, encoding, summarization, text
from runner.data.tokenizing import backend

DOCUMENTS = [f"document {n} " * (n % 9 + 1) for n in range(60)] + [
    "naïve 🦜 漢字、かな。\n\ttabs and  spaces",
    "مرحبا 안녕하세요 <|endoftext|> <|extratoken_5|> ﷽",
    "a new ideograph \U000323b0's place \u088f",
    "",
]
OPTIONS = ("--max-sequence-length", "16", "--files-per-record", "10", "--json")
#: The command in a process where gigatoken cannot be imported.
BLOCKED = (
    *(sys.executable, "-c"),
    "import sys; sys.modules['gigatoken'] = None; "
    "from runner.cli.root import main; sys.exit(main())",
)


@pytest.fixture
def pile(workdir: Path) -> Path:
    """The file a.jsonl, beside a tokenizer at tok."""
    Path("tok").mkdir()
    write_tokenizer(Path("tok"))
    path = workdir / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    backend.choose.cache_clear()
    yield
    backend.choose.cache_clear()


def _records(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).glob("*.tfrecord")}


def _params(folder: str) -> dict:
    return json.loads((Path(folder) / "data_params.json").read_text())


@pytest.mark.parametrize("kind", ["pile", "summarization"])
def test_the_same_records_without_it(kind: str, gptj, pile: Path, monkeypatch: pytest.MonkeyPatch):
    common = ("data", kind, "a.jsonl", "--tokenizer", "tok", *OPTIONS, "--out")
    if kind == "summarization":
        more = ("--allow-longer-abstracts", "--truncate-article", "--max-sequence-length", 64)
        common = (*common[:5], *OPTIONS, *more, "--out")
        rows = [{"article": one, "summary": other} for one, other in pairwise(DOCUMENTS)]
        pile.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run([*BLOCKED, *map(str, common), "slow"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 300)
    assert gptj(*common, "fast").code == 0
    assert gptj(*common, "two", "--processes", 2).code == 0
    assert len(_records("slow")) > 3
    assert _records("slow") == _records("fast") == _records("two")
    slow, fast = _params("slow"), _params("fast")
    why = slow["tokenizer_backend"].pop("why")
    assert why == "gigatoken is not used: it is not installed"
    versions = [{"name": name, "version": metadata.version(name)} for name in backend.NAMES]
    assert [slow.pop("tokenizer_backend"), fast.pop("tokenizer_backend")] == versions
    assert slow == fast
    assert fast["tokenizers"] == tokenizers.__version__


def test_the_default_is_processes_only_without_it(gptj, pile: Path, monkeypatch):
    started: list[int] = []

    def pool(processes: int, *arguments: object, **options: object) -> None:
        started.append(processes)
        raise OSError("started")

    monkeypatch.setattr(encoding, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(encoding, "default_processes", lambda: 3)
    common = ("data", "pile", "a.jsonl", "--tokenizer", "tok", *OPTIONS, "--out")
    assert gptj(*common, "a").code == 0
    assert started == []
    assert gptj(*common, "b", "--ftfy").code != 0
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    backend.choose.cache_clear()
    assert gptj(*common, "c").code != 0
    assert started == [3, 3]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["pile", "summarization"])
def test_a_difference_names_the_document(
    kind: str, processes: int, gptj, pile: Path, monkeypatch: pytest.MonkeyPatch
):
    # What a process is given says which library it uses, also where another is meant.
    wrong = backend.Backend(backend.GIGATOKEN, "0.0")
    for module in (text, summarization):
        monkeypatch.setattr(module, "choose", lambda settings: wrong)
    texts = ["<|endoftext|>", "\U000323b0 a \u088f's"]
    rows = [{"text": text, "article": text, "summary": "<|endoftext|>"} for text in texts]
    pile.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = gptj(
        *("data", kind, "a.jsonl", "--tokenizer", "tok", *OPTIONS, "--processes", processes)
    )
    assert done.code == 1
    assert "a.jsonl:2: gigatoken 0.0 gives other tokens than tokenizers" in done.stderr
    assert "hint: run `pip uninstall gigatoken`" in done.stderr
    assert not Path("data").exists()


def test_tokens_of_two_versions_are_not_mixed(gptj, pile: Path, monkeypatch):
    common = ("data", "pile", "a.jsonl", "--tokenizer", "tok", *OPTIONS)
    real = build._PartWriter._close

    def stopping(self, *arguments: object, **options: object) -> None:
        real(self, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(build._PartWriter, "_close", stopping)
        assert gptj(*common).code == 130
    monkeypatch.setattr(build, "tokenizers_version", "0.99")
    done = gptj(*common, "--resume")
    assert done.code == 2
    assert f"has tokens of tokenizers {tokenizers.__version__}, found version 0.99" in done.stderr
