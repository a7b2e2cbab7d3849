"""`gptj data pile --download` and `summarization --download`, from a hub on the loopback device."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from gptj_convert.formats.layouts.gpt2_tokenizer import write_tokenizer
from gptj_convert.hub.download import RECORD_FILE
from tests.cli.fake_hub import (
    COMMIT,
    REPOSITORY,
    FakeHub,
    client_alone,
    point_at,
    refused_endpoint,
    serving,
)

LARGE = "train/00.jsonl.zst"
FOLDER = Path("small-gptj")


def _lines(documents: int, length: int = 200) -> bytes:
    """Return documents that hardly compress."""
    words = random.Random(documents)
    texts = ({"text": words.randbytes(length // 2).hex()} for _ in range(documents))
    return zstd.compress("\n".join(map(json.dumps, texts)).encode())


#: Larger than the client's pieces, so that a cut leaves something to resume from.
PILE = {
    LARGE: _lines(4, 700_000),
    "train/01.jsonl.zst": _lines(2),
    "train/02.jsonl.zst": _lines(3),
    "val.jsonl.zst": _lines(4),
    "test.jsonl.zst": _lines(5),
    "README.md": b"words",
    ".gitattributes": b"",
    "SHA256SUMS.txt": b"x",
}
SMALL = ("--part", "val", "--part", "train/01")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(autouse=True)
def alone(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with client_alone(workdir.with_name(f"{workdir.name}-home"), monkeypatch):
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(dict(PILE), kind="dataset")
    with serving(hub) as endpoint:
        point_at(endpoint, monkeypatch)
        yield hub


@pytest.fixture
def download(gptj, tokenizer_folder: Path) -> Callable:
    """Fetch from the hub of the test and pack, in this process."""

    def call(*arguments: object, kind: str = "pile", repository: str | None = REPOSITORY):
        named = ("--repository", repository) if repository else ()
        common = ("--tokenizer", tokenizer_folder, "--processes", 1, "--json")
        return gptj("data", kind, "--download", *named, *arguments, *common)

    return call


def _names(folder: Path = FOLDER) -> set[str]:
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return files - {RECORD_FILE}


def _refused(done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert "a fault in gptj itself" not in done.stderr
    assert "\nhint: " in done.stderr
    for word in words:
        assert word in done.stderr


# What is fetched.


def test_chosen_parts_are_fetched_and_packed(hub: FakeHub, download):
    done = download(*SMALL)
    assert done.code == 0, done.stderr
    chosen = {"val.jsonl.zst", "train/01.jsonl.zst"}
    assert _names() == hub.fetched == chosen
    for name in chosen:
        assert (FOLDER / name).read_bytes() == PILE[name]
    size = sum(len(PILE[name]) for name in chosen)
    assert f"{REPOSITORY} at {COMMIT[:12]}: 2 files, 0.00 GB → {FOLDER}" in done.stderr
    assert done.json["download"] == {
        "output": str(FOLDER), "commit": COMMIT, "bytes": size, "fetched": size, "offline": False
    }  # fmt: skip
    assert {name: part["documents"] for name, part in done.json["parts"].items()} == {
        "train": 2, "val": 4
    }  # fmt: skip
    assert done.json["output"] == "data"
    assert {path for _, path in hub.requests if "/api/" in path} == {f"/api/datasets/{REPOSITORY}"}


def test_all_parts_are_those_whose_names_say_it(hub: FakeHub, download):
    hub.files[LARGE] = _lines(1)
    assert download().json["documents"] == 15
    assert _names() == {name for name in PILE if name.endswith(".zst")}


@pytest.mark.parametrize(
    ("parts", "fetched"),
    [
        (["test"], {"test.jsonl.zst"}),
        (["train/01", "train/02"], {"train/01.jsonl.zst", "train/02.jsonl.zst"}),
        (["t", "train/01"], {n for n in PILE if n.startswith("t")}),
        (["val.jsonl.zst", "val"], {"val.jsonl.zst"}),
    ],
)
def test_parts(parts: list[str], fetched: set[str], hub: FakeHub, download):
    hub.files[LARGE] = _lines(1)
    chosen = [word for part in parts for word in ("--part", part)]
    assert download("raw", *chosen).code == 0
    assert _names(Path("raw")) == fetched


def test_only_what_was_asked_for_is_packed(hub: FakeHub, download):
    assert download("--part", "train/01").json["documents"] == 2
    done = download("--part", "val", "--out", "val")
    assert done.json["documents"] == 4
    assert list(json.loads(Path("val/data_params.json").read_text())["sources"]) == [
        str(FOLDER / "val.jsonl.zst")
    ]


def test_a_revision_is_asked_for_and_pinned(hub: FakeHub, download):
    hub.revisions.add("refs/convert/parquet")
    assert download("--part", "val", repository=f"{REPOSITORY}@refs/convert/parquet").code == 0
    about = f"/api/datasets/{REPOSITORY}/revision/refs/convert/parquet"
    assert ("GET", about) in hub.requests
    assert all(COMMIT in path for _, path in hub.requests if "/resolve/" in path)


def _pairs(count: int) -> bytes:
    articles = [f"article {n} says this and that, at some length" for n in range(count)]
    table = pa.table({"article": articles, "highlights": [f"summary {n}" for n in range(count)]})
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def test_summaries_of_one_folder_of_a_repository(hub: FakeHub, download):
    hub.files = {f"{v}/validation-00000-of-00001.parquet": _pairs(3) for v in ("1.0.0", "3.0.0")}
    hub.files |= {f"3.0.0/train-0000{n}-of-00002.parquet": _pairs(4 + n) for n in (0, 1)}
    hub.files |= {"3.0.0/test-00000-of-00001.parquet": _pairs(2)}
    done = download(kind="summarization", repository=f"{REPOSITORY}/3.0.0")
    assert done.code == 0, done.stderr
    assert hub.fetched == {name for name in hub.files if name.startswith("3")}
    assert {name: part["documents"] for name, part in done.json["parts"].items()} == {
        "train": 9, "val": 3, "test": 2
    }  # fmt: skip
    done = download(
        "--part", "train-00001", "--out", "x", kind="summarization",
        repository=f"{REPOSITORY}/3.0.0",
    )  # fmt: skip
    assert (done.json["documents"], done.json["download"]["fetched"]) == (5, 0)


@pytest.mark.parametrize(
    ("kind", "repository"),
    [("pile", "monology/pile-uncopyrighted"), ("summarization", "abisee/cnn_dailymail")],
)
def test_the_defaults(kind: str, repository: str, hub: FakeHub, download):
    _refused(download(kind=kind, repository=None), 1, f"{repository}: not found")
    assert f"/api/datasets/{repository}" in hub.requests[-1]
    assert not list(Path.cwd().iterdir())


# What is not fetched again.


def test_a_second_call_fetches_nothing(hub: FakeHub, download):
    first = download(*SMALL)
    hub.served.clear()
    before = {p: p.stat().st_mtime_ns for p in FOLDER.rglob("*")}
    again = download(*SMALL, "--out", "again")
    assert again.json["download"]["fetched"] == 0
    assert not hub.served
    assert {p: p.stat().st_mtime_ns for p in FOLDER.rglob("*")} == before
    assert again.json["tokens"] == first.json["tokens"]
    # The same command resumes where packing was interrupted, or has ended.
    assert download(*SMALL, "--resume").code == 0
    assert not hub.served


def test_further_parts_join_what_is_there(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, download):
    assert download("--part", "train/01", "--out", "a").code == 0
    assert download("--part", "val", "--out", "b").code == 0
    point_at(refused_endpoint(), monkeypatch)
    done = download(*SMALL, "--out", "c")
    assert done.code == 0, done.stderr
    assert done.json["download"]["offline"] is True
    assert done.json["documents"] == 6
    assert download("--part", "val", "--out", "d").json["documents"] == 4
    # Which files there are is known without the hub: these are not all of train.
    for part in ("train", "test", "train/0"):
        _refused(download("--part", part, "--out", "e"), 1, "the hub cannot be reached")
    _refused(download("--part", "train/9", "--out", "e"), 1, "has no part 'train/9'")
    (FOLDER / "val.jsonl.zst").write_bytes(PILE["val.jsonl.zst"][:-1])
    _refused(download("--part", "val", "--out", "e"), 1, "the hub cannot be reached")


def test_a_model_and_a_data_set_of_one_name(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, gptj, download
):
    assert download("--part", "val").code == 0
    point_at(refused_endpoint(), monkeypatch)
    _refused(gptj("download", REPOSITORY), 1, "the hub cannot be reached")


def test_a_new_commit_replaces_what_was_downloaded(hub: FakeHub, download):
    hub.files[LARGE] = _lines(1)
    assert download("--part", "train/0", "--out", "a").code == 0
    hub.commit, hub.files["train/01.jsonl.zst"] = COMMIT[::-1], _lines(7)
    hub.served.clear()
    done = download("--part", "train/0", "--out", "b")
    assert done.json["documents"] == 1 + 7 + 3
    assert set(hub.served) == {"train/01.jsonl.zst"}


# Faults.


def test_a_dropped_connection_resumes_in_the_next_run(hub: FakeHub, download):
    hub.cut[LARGE] = [1_200_000] + [0] * 5
    _refused(
        download("--part", "train/00"),
        1,
        LARGE,
        f"of {len(PILE[LARGE])} bytes have been downloaded",
    )
    assert not (FOLDER / LARGE).exists()
    assert not Path("data").exists()
    hub.cut.clear()
    hub.served.clear()
    # Parts of other files are left alone, whatever these are called.
    other = FOLDER / "train" / f".00.jsonl.zst.x.{'0' * 16}.part"
    other.write_bytes(b"x")
    assert download("--part", "train/00").code == 0
    assert (FOLDER / LARGE).read_bytes() == PILE[LARGE]
    assert 0 < hub.served[LARGE] <= len(PILE[LARGE]) - 2**20
    assert _names() == {LARGE, str(other.relative_to(FOLDER))}


def test_what_an_interrupted_download_brought_is_known(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, download
):
    hub.cut[LARGE] = [0] * 5
    _refused(download("--part", "train/0"), 1, LARGE)
    with monkeypatch.context() as offline:
        point_at(refused_endpoint(), offline)
        assert download("--part", "train/01", "--out", "a").json["documents"] == 2
        _refused(download("--part", "train/0", "--out", "b"), 1, "cannot be reached")
    # It may be replaced, also by a download of another commit that is interrupted in its turn.
    hub.commit = COMMIT[::-1]
    hub.files |= {"train/01.jsonl.zst": _lines(7), "train/02.jsonl.zst": _lines(8)}
    hub.cut["train/02.jsonl.zst"] = [0] * 5
    _refused(download("--part", "train/0", "--out", "b"), 1, "train/02.jsonl.zst")
    assert download("--part", "train/01", "--part", "train/02", "--out", "b").code == 0


def test_wrong_bytes_once_are_fetched_again_and_twice_are_refused(hub: FakeHub, download):
    name = "val.jsonl.zst"
    hub.instead[name] = [PILE[name][::-1]]
    assert download("--part", "val", "--out", "a").code == 0
    assert hub.served[name] == 2 * len(PILE[name])
    shutil.rmtree(FOLDER)
    hub.instead[name] = [PILE[name][::-1]] * 2
    _refused(
        download("--part", "val", "--out", "b"), 1, f"{name}: after two downloads, the", "sha256:"
    )
    assert not _names()


def test_too_little_space_is_known_before_the_first_byte(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, download
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    _refused(download("--part", "train"), 1, "0.00 GB needed, 0.00 GB free", "as SRC")
    assert not hub.served
    assert not FOLDER.exists()


def test_two_downloads_into_one_folder(hub: FakeHub, download):
    FOLDER.mkdir()
    handle = os.open(FOLDER, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        _refused(download(*SMALL), 1, "another download is using this folder", "as SRC")
    finally:
        os.close(handle)
    assert download(*SMALL).code == 0


@pytest.mark.parametrize(
    "name",
    ["../train/x.jsonl", "/tmp/train.jsonl", "train/../../x.jsonl", "train//x.jsonl",
     "train/./x.jsonl", "train/nul\0.jsonl", "train\n.jsonl", "/train/x.jsonl"],
)  # fmt: skip
def test_names_that_lead_elsewhere(name: str, hub: FakeHub, download):
    hub.listed_only = [name]
    _refused(download("--part", "train"), 1, f"{name!r}, which points outside the folder")
    assert not hub.fetched
    assert not list(Path.cwd().iterdir())
    # Where it is not asked for it does no harm.
    assert download("--part", "val").code == 0
    assert {p.name for p in Path.cwd().iterdir()} == {FOLDER.name, "data"}


def test_a_users_own_file_is_never_overwritten(hub: FakeHub, download):
    (FOLDER / "train").mkdir(parents=True)
    (FOLDER / "train/01.jsonl.zst").write_bytes(b"precious")
    _refused(download(*SMALL), 2, "already exists", "as SRC")
    assert (FOLDER / "train/01.jsonl.zst").read_bytes() == b"precious"
    (FOLDER / "train/01.jsonl.zst").write_bytes(PILE["train/01.jsonl.zst"])
    assert download(*SMALL).code == 0
    assert set(hub.served) == {"val.jsonl.zst"}


# What is refused.


def test_missing_parts(hub: FakeHub, download):
    _refused(download("--part", "dev"), 1, f"{REPOSITORY}: has no part 'dev'", "'val.jsonl.zst'")
    del hub.files["test.jsonl.zst"]
    _refused(download("--part", "test"), 1, "has no part 'test'")
    hub.files = {"data.jsonl": b"{}", "README.md": b""}
    _refused(download(), 1, "no file's name says that it is train, val or test", "'data.jsonl'")
    hub.files = {"README.md": b""}
    _refused(download(repository=f"{REPOSITORY}/x"), 1, f"{REPOSITORY}/x: ", "no file that can be")
    assert not hub.fetched


@pytest.mark.parametrize("name", ["pile", "a/b@", "@main", "", "a//b", "../x", "a b/c", "/a/b"])
def test_names_that_no_data_set_has(name: str, hub: FakeHub, download):
    _refused(download(repository=name or " "), 2, "name", "OWNER/NAME")
    assert not hub.requests


def test_what_would_fail_after_the_download_fails_before(
    hub: FakeHub, gptj, tokenizer_folder: Path, download
):
    Path("data").mkdir()
    _refused(download(), 2, "data: already exists", "--force")
    _refused(
        download("--out", "x", "--gzip", "--format", "hdf5"),
        2,
        "--gzip goes with",
    )
    _refused(download("raw", "more", "--out", "x"), 2, "expected at most one SRC")
    _refused(download("x", "--out", "x"), 2, "x: holds the source file x")
    command = ("data", "pile", "--download", "--repository", REPOSITORY, "--out", "x")
    _refused(gptj(*command, "--tokenizer", "nowhere"), 1, "expected a tokenizer")
    for option in (("--part", "val"), ("--repository", REPOSITORY)):
        done = gptj("data", "pile", "raw", *option, "--tokenizer", tokenizer_folder)
        _refused(done, 2, "has no effect without --download")
    assert not hub.requests
