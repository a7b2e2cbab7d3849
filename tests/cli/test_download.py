"""`gptj download` against a hub on the loopback device, through the hub's own client."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from gptj_convert.hub import download
from gptj_convert.hub.client import TRIES
from gptj_convert.hub.model_files import list_model
from gptj_convert.streams.progress import Progress
from tests.cli import fake_hub
from tests.cli.fake_hub import COMMIT, REPOSITORY, FakeHub, client_alone, point_at, serving

SMALL_FILES = {
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "vocab.json": b'{"a": 0}',
    "merges.txt": b"#version: 0.2\n",
    "generation_config.json": b"{}",
}
#: Larger than the client's pieces, so that a cut leaves something to resume from.
WEIGHTS = bytes(range(256)) * 16 * 1024
FOLDER = Path("small-gptj")
WEIGHTS_FILE = FOLDER / "model.safetensors"


@pytest.fixture(autouse=True)
def alone(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with client_alone(workdir.with_name(f"{workdir.name}-home"), monkeypatch):
        yield


@pytest.fixture
def hub(small_hf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    config = (small_hf / "config.json").read_bytes()
    hub = FakeHub({"config.json": config, "model.safetensors": WEIGHTS, **SMALL_FILES})
    with serving(hub) as endpoint:
        point_at(endpoint, monkeypatch)
        yield hub


@pytest.fixture
def refused_endpoint() -> str:
    return fake_hub.refused_endpoint()


def _names(folder: Path = FOLDER) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")} - {download.RECORD_FILE}


def _refused(done, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    # The problems of a list are indented.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    starts = [line.partition(": ")[0] for line in lines]
    assert starts[-2:] == ["error", "hint"]
    assert starts.count("error") == 1
    assert "a fault in gptj itself" not in done.stderr
    for word in words:
        assert word in done.stderr


# What is fetched.


def test_one_set_of_weights_and_what_goes_with_it(hub: FakeHub, gptj):
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot"):
        hub.files[name] = b"x" * 1000
    hub.files |= {"model.onnx": b"x", "diagram.png": b"x", ".gitattributes": b"x"}
    done = gptj("download", REPOSITORY)
    assert done.code == 0, done.stderr
    assert done.stdout == "small-gptj\n"
    assert _names() == {"config.json", "model.safetensors", *SMALL_FILES}
    assert hub.fetched == _names()
    for name in _names():
        assert (FOLDER / name).read_bytes() == hub.files[name]
    assert {path for _, path in hub.requests if "/api/" in path} == {f"/api/models/{REPOSITORY}"}


def test_a_bin_where_there_is_no_safetensors(hub: FakeHub, gptj):
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    hub.files["tf_model.h5"] = b"x"
    assert gptj("download", REPOSITORY, "--out", "elsewhere").code == 0
    assert _names(Path("elsewhere")) == {"config.json", "pytorch_model.bin", *SMALL_FILES}
    assert not FOLDER.exists()


def test_what_was_fetched_converts(hub: FakeHub, small_hf: Path, gptj):
    hub.files = {p.name: p.read_bytes() for p in small_hf.iterdir()}
    assert gptj("download", REPOSITORY).code == 0
    assert gptj("convert", FOLDER, "--to", "tf").code == 0
    assert Path("converted/tf_model.ckpt.index").exists()


@pytest.mark.parametrize("suffix", ["", "@float16"])
def test_convert_fetches_a_repository_first(suffix: str, hub: FakeHub, small_hf: Path, gptj):
    hub.files["model.safetensors"] = (small_hf / "model.safetensors").read_bytes()
    done = gptj("convert", REPOSITORY + suffix, "--to", "tf")
    assert done.code == 0
    assert "is taken as a repository on the hub" in done.stderr
    revision = f"/revision/{suffix[1:]}" if suffix else ""
    assert ("GET", f"/api/models/{REPOSITORY}{revision}") in hub.requests
    assert gptj("verify", "--level", "weights").code == 0
    assert gptj("convert", "nowhere/there", "--to", "tf", "--out", "x").code == 1


def test_a_revision_is_asked_for_and_pinned(hub: FakeHub, gptj):
    assert gptj("download", REPOSITORY, "--revision", "float16").code == 0
    assert ("GET", f"/api/models/{REPOSITORY}/revision/float16") in hub.requests
    assert all(COMMIT in path for _, path in hub.requests if "/resolve/" in path)


def test_a_second_call_fetches_nothing(hub: FakeHub, gptj):
    assert gptj("download", REPOSITORY, "--json").json["fetched"] > len(WEIGHTS)
    before = {p: p.stat().st_mtime_ns for p in FOLDER.iterdir()}
    hub.served.clear()
    again = gptj("download", REPOSITORY, "--json")
    assert again.json["fetched"] == 0
    assert not hub.served
    assert {p: p.stat().st_mtime_ns for p in FOLDER.iterdir()} == before


def test_files_that_came_another_way_are_not_fetched_again(hub: FakeHub, gptj):
    FOLDER.mkdir()
    for name, data in hub.files.items():
        (FOLDER / name).write_bytes(data)
    assert gptj("download", REPOSITORY).code == 0
    assert not hub.served


def test_json_is_one_object(hub: FakeHub, gptj):
    done = gptj("download", REPOSITORY, "--json")
    assert done.json["ok"] is True
    assert done.json["output"] == "small-gptj"
    assert done.json["commit"] == COMMIT
    assert done.json["bytes"] == sum(map(len, hub.files.values()))
    assert done.json["offline"] is False
    assert len(done.stdout.splitlines()) == 1


def test_nothing_else_prints(hub: FakeHub, gptj):
    hub.api_statuses, hub.file_statuses = [503], [429]
    done = gptj("download", REPOSITORY)
    assert done.stderr.splitlines() == [
        f"{REPOSITORY} at {COMMIT[:12]}: 7 files, 0.00 GB → small-gptj"
    ]
    assert gptj("download", REPOSITORY, "--quiet").stderr == ""


def test_progress_carries_bytes(hub: FakeHub):
    listing = list_model(REPOSITORY, None, FOLDER)
    events: list[Progress] = []

    def collect() -> Generator[Progress, None, None]:
        assert (yield from download.fetch(listing, FOLDER)) == listing.total

    events.extend(collect())
    done = [e.done for e in events]
    assert done == sorted(done)
    assert done[-1] == listing.total == sum(map(len, hub.files.values()))
    weights = [e.done for e in events if e.what == "model.safetensors"]
    assert len(weights) >= 4
    assert weights[-1] == listing.total


def test_a_new_commit_replaces_what_was_downloaded(hub: FakeHub, gptj):
    assert gptj("download", REPOSITORY).code == 0
    hub.commit = COMMIT[::-1]
    hub.files["model.safetensors"] = WEIGHTS[::-1]
    hub.served.clear()
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS[::-1]
    assert set(hub.served) == {"model.safetensors"}


def test_a_damaged_file_of_a_download_is_fetched_again(hub: FakeHub, gptj):
    assert gptj("download", REPOSITORY).code == 0
    WEIGHTS_FILE.write_bytes(WEIGHTS[:-1])
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS


# Connections that fail.


@pytest.mark.parametrize("statuses", [[429], [503, 500], [503] * 4])
def test_a_busy_hub_is_asked_again(statuses: list[int], hub: FakeHub, gptj):
    hub.api_statuses, hub.file_statuses = statuses.copy(), statuses.copy()
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS


def test_a_hub_that_stays_busy_is_refused(hub: FakeHub, gptj):
    hub.api_statuses = [503] * 100
    _refused(gptj("download", REPOSITORY), 1, "503 Service Unavailable")
    assert len(hub.requests) == TRIES
    assert not FOLDER.exists()


def test_a_dropped_connection_resumes_in_the_same_run(hub: FakeHub, gptj):
    hub.cut["model.safetensors"] = [1_500_000] * 2
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS
    assert hub.served["model.safetensors"] < len(WEIGHTS) + 2 * 2**20


def test_a_dropped_connection_resumes_in_the_next_run(hub: FakeHub, gptj):
    hub.cut["model.safetensors"] = [2_500_000] + [0] * 5
    _refused(gptj("download", REPOSITORY), 1, "model.safetensors", f"of {len(WEIGHTS)} bytes")
    assert not WEIGHTS_FILE.exists()
    hub.cut.clear()
    hub.served.clear()
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS
    assert 0 < hub.served["model.safetensors"] <= len(WEIGHTS) - 2 * 2**20
    assert _names() == {"config.json", "model.safetensors", *SMALL_FILES}


def test_a_part_of_other_weights_is_never_appended_to(hub: FakeHub, gptj):
    hub.cut["model.safetensors"] = [2_500_000] + [0] * 5
    assert gptj("download", REPOSITORY).code == 1
    hub.cut.clear()
    hub.commit = COMMIT[::-1]
    hub.files["model.safetensors"] = WEIGHTS[::-1]
    hub.served.clear()
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS[::-1]
    assert hub.served["model.safetensors"] == len(WEIGHTS)
    assert _names() == {"config.json", "model.safetensors", *SMALL_FILES}


def test_a_hub_without_ranges_sends_the_file_from_its_beginning(hub: FakeHub, gptj):
    hub.ignores_ranges = True
    hub.cut["model.safetensors"] = [2_500_000, 1_500_000, 1_500_000]
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS


def test_a_hub_without_ranges_that_always_disconnects_is_refused(hub: FakeHub, gptj):
    hub.ignores_ranges = True
    hub.cut["model.safetensors"] = [2_500_000, 1_500_000] * 50
    _refused(gptj("download", REPOSITORY), 1, "model.safetensors")


# What arrives is not the file.


def test_wrong_bytes_once_are_fetched_again(hub: FakeHub, gptj):
    hub.instead["model.safetensors"] = [WEIGHTS[::-1]]
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS
    assert hub.served["model.safetensors"] == 2 * len(WEIGHTS)


def test_inspect_checks_what_was_fetched(hub: FakeHub, small_hf: Path, gptj):
    hub.files["model.safetensors"] = (small_hf / "model.safetensors").read_bytes()
    assert gptj("download", REPOSITORY).code == 0
    done = gptj("inspect", FOLDER, "--check", "--json")
    assert done.code == 0
    assert done.json["check"]["checked"] == {download.RECORD_FILE: {"files": 7, "tensors": 0}}
    for name in ("model.safetensors", "vocab.json"):
        raw = bytearray(hub.files[name])
        raw[-1] ^= 1
        (FOLDER / name).write_bytes(raw)
    (FOLDER / "merges.txt").unlink()
    done = gptj("inspect", FOLDER, "--check", "--json")
    assert done.code == 3
    wrong = {p["name"] for p in done.json["check"]["problems"]}
    assert wrong == {"model.safetensors", "vocab.json", "merges.txt"}


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.json"])
def test_wrong_bytes_that_stay_wrong(name: str, hub: FakeHub, gptj):
    wrong = hub.files[name][::-1]
    hub.instead[name] = [wrong] * 100
    done = gptj("download", REPOSITORY)
    remote = download.RemoteFile(len(wrong), "sha256:" if name.endswith("rs") else "git:")
    (FOLDER / "wrong").write_bytes(wrong)
    (FOLDER / "right").write_bytes(hub.files[name])
    hashes = [download._digest(FOLDER / file, remote) for file in ("wrong", "right")]
    assert hashes[0] != hashes[1]
    _refused(done, 1, name, *hashes)
    assert hub.served[name] == 2 * len(wrong)
    assert not any(name in found for found in _names())


@pytest.mark.parametrize("body", [b"<html>Log in</html>", b"", WEIGHTS + b"x"])
def test_an_answer_of_another_size(body: bytes, hub: FakeHub, gptj):
    hub.instead["model.safetensors"] = [body] * 100
    words = (f"has {len(body)} bytes", f"expected {len(WEIGHTS)}")
    _refused(gptj("download", REPOSITORY), 1, "model.safetensors", *words)
    assert not any("model.safetensors" in name for name in _names())


def test_a_network_that_asks_for_a_login(hub: FakeHub, gptj):
    hub.answers_html = True
    _refused(gptj("download", REPOSITORY), 1, "the answer does not come from a hub")


# What is refused.


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "access is gated"),
        (401, "GatedRepo", "accept its terms"),
        (404, "RepoNotFound", "not found, or private"),
        (401, "RepoNotFound", "not found, or private"),
        (403, "", "403 Forbidden"),
        (401, "", "HF_TOKEN"),
    ],
)
def test_no_access(status: int, code: str, words: str, hub: FakeHub, gptj):
    hub.refusal = status, code
    _refused(gptj("download", REPOSITORY), 1, REPOSITORY, words)
    assert len(hub.requests) == 1
    assert not FOLDER.exists()


def test_no_such_repository_or_revision(hub: FakeHub, gptj):
    _refused(gptj("download", "someone/else"), 1, "someone/else: not found")
    _refused(gptj("download", REPOSITORY, "--revision", "v9"), 1, "the revision does not exist")


@pytest.mark.parametrize("name", ["a/b/c", "../x", "", "a b", "-x-/y", "x..y", "./here", "a\nb"])
def test_names_that_no_repository_has(name: str, hub: FakeHub, gptj):
    _refused(gptj("download", "--", name), 2, "is not a repository's name", "OWNER/NAME")
    assert not hub.requests
    assert not list(Path.cwd().iterdir())


def test_no_network(refused_endpoint: str, monkeypatch: pytest.MonkeyPatch, gptj):
    point_at(refused_endpoint, monkeypatch)
    _refused(gptj("download", REPOSITORY), 1, "the hub cannot be reached", "refused")
    assert not FOLDER.exists()
    done = gptj("download", REPOSITORY, "--json")
    assert done.json["ok"] is False
    assert done.json["error"]["kind"] == "hub"


def test_a_complete_folder_needs_no_network(
    hub: FakeHub, refused_endpoint: str, monkeypatch: pytest.MonkeyPatch, gptj
):
    assert gptj("download", REPOSITORY).code == 0
    point_at(refused_endpoint, monkeypatch)
    done = gptj("download", REPOSITORY, "--json")
    assert done.code == 0
    assert done.json["offline"] is True
    assert done.json["commit"] == COMMIT
    # Another revision is another model, and a file that is cut or gone is not whole.
    _refused(gptj("download", REPOSITORY, "--revision", "float16"), 1, "cannot be reached")
    _refused(gptj("download", "someone/else", "--out", FOLDER), 1, "cannot be reached")
    WEIGHTS_FILE.write_bytes(WEIGHTS[:-1])
    _refused(gptj("download", REPOSITORY), 1, "cannot be reached")


# The hub's cache, as its own library fills it.


def _cached(hub: FakeHub, endpoint: str, *names: str, revision: str | None = None) -> None:
    for name in names or hub.files:
        # Its arguments' defaults were read when it was imported.
        hf_hub_download(
            REPOSITORY, name, revision=revision, endpoint=endpoint, cache_dir=constants.HF_HUB_CACHE
        )
    hub.served.clear()


def test_the_cache_stands_in_for_the_hub(
    hub: FakeHub, refused_endpoint: str, monkeypatch: pytest.MonkeyPatch, gptj
):
    _cached(hub, constants.ENDPOINT)
    point_at(refused_endpoint, monkeypatch)
    done = gptj("download", REPOSITORY, "--json")
    assert done.code == 0, done.stderr
    assert "its cache on this machine holds the files" in done.stderr
    assert done.json["commit"] == COMMIT
    assert {n: (FOLDER / n).read_bytes() for n in hub.files} == hub.files
    assert gptj("download", REPOSITORY, "--json").json["offline"] is True
    by_commit = ("--revision", COMMIT, "--out", "elsewhere")
    assert gptj("download", REPOSITORY, *by_commit).code == 0
    for other in ("float16", "../../../refs/main", "1" * 40):
        where = ("--revision", other, "--out", "x")
        _refused(gptj("download", REPOSITORY, *where), 1, "cannot be reached")


def test_the_cache_saves_the_transfer(hub: FakeHub, gptj):
    _cached(hub, constants.ENDPOINT, "model.safetensors")
    assert gptj("download", REPOSITORY).code == 0
    assert "model.safetensors" not in hub.served
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS


def test_a_damaged_file_of_the_cache_is_never_taken(
    hub: FakeHub, refused_endpoint: str, monkeypatch: pytest.MonkeyPatch, gptj
):
    _cached(hub, constants.ENDPOINT)
    (blob,) = (p for p in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if len(p.name) == 64)
    blob.write_bytes(bytes(len(WEIGHTS)))
    done = gptj("download", REPOSITORY)
    assert done.code == 0
    assert "the copy in the hub's cache is damaged" in done.stderr
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS
    shutil.rmtree(FOLDER)
    point_at(refused_endpoint, monkeypatch)
    _refused(gptj("download", REPOSITORY), 1, "model.safetensors: the hub cannot be reached")
    assert not WEIGHTS_FILE.exists()


@pytest.mark.parametrize("names", [["config.json"], ["model.safetensors"]])
def test_a_cache_that_lacks_files_is_no_hub(
    names: list[str], hub: FakeHub, refused_endpoint: str, monkeypatch: pytest.MonkeyPatch, gptj
):
    _cached(hub, constants.ENDPOINT, *names)
    point_at(refused_endpoint, monkeypatch)
    _refused(gptj("download", REPOSITORY), 1, "cannot be reached")
    assert not FOLDER.exists()


def test_files_that_are_no_links_into_the_cache_prove_nothing(
    hub: FakeHub, refused_endpoint: str, monkeypatch: pytest.MonkeyPatch, gptj
):
    _cached(hub, constants.ENDPOINT)
    (weights,) = Path(constants.HF_HUB_CACHE).rglob("snapshots/*/model.safetensors")
    weights.unlink()
    weights.write_bytes(WEIGHTS)
    point_at(refused_endpoint, monkeypatch)
    _refused(gptj("download", REPOSITORY), 1, "cannot be reached")


# Addresses, and what is no GPT-J.


def test_an_address_with_a_revision(hub: FakeHub, gptj):
    for n, address in enumerate(
        (f"{REPOSITORY}@float16", f"https://huggingface.co/{REPOSITORY}/tree/float16")
    ):
        assert gptj("download", address, "--out", f"out{n}").code == 0
        assert ("GET", f"/api/models/{REPOSITORY}/revision/float16") in hub.requests
        hub.requests.clear()
    done = gptj("download", f"{REPOSITORY}@float16", "--revision", "main")
    _refused(done, 2, "'float16'", "'main'")
    hub.files["model.safetensors"] = WEIGHTS
    page = f"https://huggingface.co/{REPOSITORY}"
    assert "is taken for" not in gptj("convert", page, "--to", "tf").stderr
    assert hub.requests


def test_another_architecture_is_refused_before_its_weights(hub: FakeHub, gptj):
    hub.files["config.json"] = b'{"model_type": "gpt_neox"}'
    done = gptj("convert", REPOSITORY, "--to", "tf")
    _refused(done, 2, "config.json: model_type is 'gpt_neox', expected 'gptj'")
    assert set(hub.served) == {"config.json"}
    assert not FOLDER.exists()
    done = gptj("download", REPOSITORY)
    assert done.code == 0
    assert "note: " in done.stderr
    assert "the model is downloaded, but cannot be converted" in done.stderr
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"x" * 2**21])
def test_a_config_that_is_none(text: bytes, hub: FakeHub, gptj):
    hub.files["config.json"] = text
    _refused(gptj("download", REPOSITORY), 1, f"{REPOSITORY}: config.json")
    assert set(hub.served) <= {"config.json"}


def test_an_unfinished_folder_needs_the_network(
    hub: FakeHub, refused_endpoint: str, monkeypatch: pytest.MonkeyPatch, gptj
):
    hub.cut["model.safetensors"] = [0] * 5
    assert gptj("download", REPOSITORY).code == 1
    point_at(refused_endpoint, monkeypatch)
    _refused(gptj("download", REPOSITORY), 1, "cannot be reached")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"a": 1}}', "\0"])
def test_a_damaged_record_counts_for_nothing(text: str, hub: FakeHub, gptj):
    assert gptj("download", REPOSITORY).code == 0
    (FOLDER / download.RECORD_FILE).write_text(text)
    hub.served.clear()
    assert gptj("download", REPOSITORY).code == 0
    assert not hub.served
    assert json.loads((FOLDER / download.RECORD_FILE).read_text())["commit"] == COMMIT


def test_too_little_space_is_known_before_the_first_byte(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, gptj
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, len(WEIGHTS)))
    _refused(gptj("download", REPOSITORY), 1, "GB needed", "0.00 GB free", "--out")
    assert set(hub.served) <= {"config.json"}
    assert not FOLDER.exists()


def test_a_disk_that_fills_midway_keeps_the_partial_download(hub: FakeHub, gptj):
    import resource
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))
    try:
        done = gptj("download", REPOSITORY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    _refused(done, 1, "cannot be written: File too large")
    hub.served.clear()
    assert gptj("download", REPOSITORY).code == 0
    assert WEIGHTS_FILE.read_bytes() == WEIGHTS
    assert hub.served["model.safetensors"] < len(WEIGHTS)


def test_a_users_own_file_is_never_overwritten(hub: FakeHub, gptj):
    FOLDER.mkdir()
    WEIGHTS_FILE.write_bytes(b"precious")
    _refused(gptj("download", REPOSITORY), 2, "already exists", "--out")
    assert WEIGHTS_FILE.read_bytes() == b"precious"
    assert set(hub.served) <= {"config.json"}


def test_two_downloads_into_one_folder(hub: FakeHub, gptj):
    FOLDER.mkdir()
    handle = os.open(FOLDER, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        _refused(gptj("download", REPOSITORY), 1, "another download is using this folder")
    finally:
        os.close(handle)
    assert gptj("download", REPOSITORY).code == 0


# Weights in shards.

INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))


def _index(*shards: object) -> bytes:
    return json.dumps({"weight_map": {f"t{n}": s for n, s in enumerate(shards)}}).encode()


@pytest.fixture
def sharded_hub(hub: FakeHub) -> FakeHub:
    del hub.files["model.safetensors"]
    hub.files[INDEX] = _index(*SHARDS)
    hub.files |= {name: bytes([n]) * 3_000_000 for n, name in enumerate(SHARDS)}
    return hub


def test_an_index_and_the_shards_it_names(sharded_hub: FakeHub, gptj):
    for other in ("pytorch_model.bin", "model-00004-of-00004.safetensors", "adapter.safetensors"):
        sharded_hub.files[other] = b"x"
    sharded_hub.files["pytorch_model.bin.index.json"] = _index("pytorch_model.bin")
    done = gptj("download", REPOSITORY, "--json")
    assert done.code == 0, done.stderr
    assert _names() == sharded_hub.fetched == {"config.json", INDEX, *SHARDS, *SMALL_FILES}
    assert done.json["bytes"] == sum(len(sharded_hub.files[name]) for name in _names())
    for name in _names():
        assert (FOLDER / name).read_bytes() == sharded_hub.files[name]
    # A second call fetches nothing, not even the index.
    sharded_hub.served.clear()
    assert gptj("download", REPOSITORY).code == 0
    assert not sharded_hub.served


def test_the_order_of_preference(sharded_hub: FakeHub, gptj):
    sharded_hub.files["pytorch_model-1-of-1.bin"] = b"x"
    order = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in order:
        if name != INDEX:
            sharded_hub.files[name] = _index("pytorch_model-1-of-1.bin")
    for name in order:
        assert gptj("download", REPOSITORY, "--out", name).code == 0
        assert _names(Path(name)) & set(order) == {name}
        del sharded_hub.files[name]


def test_shards_that_were_fetched_convert(hub: FakeHub, small_hf: Path, gptj):
    assert gptj("convert", small_hf, "--to", "hf", "--max-shard-size", "100KB").code == 0
    hub.files = {p.name: p.read_bytes() for p in Path("converted-hf").iterdir()}
    assert gptj("download", REPOSITORY).code == 0
    assert gptj("convert", FOLDER, "--to", "tf").code == 0


@pytest.mark.parametrize("name", [INDEX, SHARDS[1]])
def test_an_interrupted_shard_resumes(name: str, sharded_hub: FakeHub, gptj):
    sharded_hub.cut[name] = [2_500_000] + [0] * 4 if name != INDEX else [10] + [0] * 4
    _refused(gptj("download", REPOSITORY), 1, name)
    sharded_hub.served.clear()
    assert gptj("download", REPOSITORY).code == 0
    assert _names() == {"config.json", INDEX, *SHARDS, *SMALL_FILES}
    assert sharded_hub.served[SHARDS[1]] <= 3_000_000 - (2 * 2**20 if name != INDEX else 0)


def test_a_new_commit_with_other_shards(sharded_hub: FakeHub, gptj):
    assert gptj("download", REPOSITORY).code == 0
    sharded_hub.commit = COMMIT[::-1]
    sharded_hub.files["other-1-of-1.safetensors"] = b"x" * 1000
    sharded_hub.files[INDEX] = _index("other-1-of-1.safetensors")
    sharded_hub.served.clear()
    assert gptj("download", REPOSITORY).code == 0
    assert set(sharded_hub.served) == {INDEX, "other-1-of-1.safetensors"}
    assert (FOLDER / INDEX).read_bytes() == sharded_hub.files[INDEX]


def test_complete_shards_need_no_network(
    sharded_hub: FakeHub, refused_endpoint: str, monkeypatch: pytest.MonkeyPatch, gptj
):
    assert gptj("download", REPOSITORY).code == 0
    point_at(refused_endpoint, monkeypatch)
    assert gptj("download", REPOSITORY).code == 0
    (FOLDER / SHARDS[2]).unlink()
    _refused(gptj("download", REPOSITORY), 1, "cannot be reached")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/tmp/x.safetensors", "a\\b.safetensors", "nul\0.safetensors", "", "..",
     "sub/x.safetensors", "config.json", "x.bin", INDEX, "*.safetensors", None, 3],
)  # fmt: skip
def test_shards_whose_names_lead_elsewhere(name: object, sharded_hub: FakeHub, gptj):
    sharded_hub.files[INDEX] = _index(SHARDS[0], name)
    if isinstance(name, str) and name not in sharded_hub.files:
        sharded_hub.listed_only = [name]
    _refused(
        gptj("download", REPOSITORY), 1, f"{REPOSITORY}: {INDEX}", "is not the name of a shard"
    )
    assert sharded_hub.fetched == {"config.json", INDEX}
    assert not list(Path.cwd().iterdir())


def test_missing_shards(sharded_hub: FakeHub, gptj):
    del sharded_hub.files[SHARDS[0]], sharded_hub.files[SHARDS[2]]
    words = (f"shard {SHARDS[0]} is not in the repository", f"shard {SHARDS[2]} is not")
    _refused(gptj("download", REPOSITORY), 1, "2 problem(s)", *words)
    assert not FOLDER.exists()


@pytest.mark.parametrize("text", [b"", b"{}", b"[", b'{"weight_map": 3}', b" " * (2**22 + 1)])
def test_an_index_that_is_none(text: bytes, sharded_hub: FakeHub, gptj):
    sharded_hub.files[INDEX] = text
    _refused(gptj("download", REPOSITORY), 1, f"{REPOSITORY}: {INDEX}")
    assert sharded_hub.fetched == {"config.json", *([INDEX] if len(text) < 2**22 else [])}


def test_weights_that_would_be_read_instead_of_the_download(sharded_hub: FakeHub, gptj):
    FOLDER.mkdir()
    WEIGHTS_FILE.write_bytes(b"precious")
    _refused(gptj("download", REPOSITORY), 2, "model.safetensors: already exists", INDEX, "--out")
    assert WEIGHTS_FILE.read_bytes() == b"precious"
    assert sharded_hub.fetched == {"config.json", INDEX}


# What else is refused.


def test_no_weights_that_can_be_read(hub: FakeHub, gptj):
    del hub.files["model.safetensors"]
    _refused(gptj("download", REPOSITORY), 1, "neither model.safetensors nor", "no weights")
    hub.files |= {"tf_model.h5": b"x", "flax_model.msgpack": b"x"}
    _refused(gptj("download", REPOSITORY), 1, "found 'tf_model.h5', 'flax_model.msgpack'")
    del hub.files["config.json"]
    _refused(gptj("download", REPOSITORY), 1, "has no config.json")
    assert not hub.fetched


def test_names_that_lead_elsewhere_are_never_used(hub: FakeHub, gptj):
    hostile = [
        "../x",
        "/tmp/x",
        "a\\b",
        "nul\0",
        "CONFIG.JSON",
        "sub/config.json",
        "../config.json",
    ]
    hub.listed_only = hostile
    assert gptj("download", REPOSITORY).code == 0
    assert hub.fetched == _names() == {"config.json", "model.safetensors", *SMALL_FILES}
    assert [p.name for p in Path.cwd().iterdir()] == ["small-gptj"]

    del hub.files["model.safetensors"]
    hub.listed_only = ["x\nerror: forged\x1b[2J.h5"]
    done = gptj("download", REPOSITORY)
    _refused(done, 1)
    assert "\x1b" not in done.stderr


def test_a_digest_that_leads_elsewhere(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, gptj):
    told = hub.information()
    next(s for s in told["siblings"] if "lfs" in s)["lfs"]["sha256"] = "../../x"
    monkeypatch.setattr(hub, "information", lambda: told)
    _refused(gptj("download", REPOSITORY), 1, "the answer does not come from a hub")


# The program as it is called: the client reads its variables at import.


def _program(endpoint: str, *arguments: str, **variables: str):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(Path.cwd() / "home")}
    command = [sys.executable, "-m", "runner.cli.root", "download", REPOSITORY, *arguments]
    source = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        command, env=kept | home | source | variables, capture_output=True, text=True
    )


def test_the_variables_of_the_client_count(hub: FakeHub):
    done = _program(constants.ENDPOINT)
    assert (done.returncode, done.stdout) == (0, "small-gptj\n"), done.stderr
    assert len(done.stderr.splitlines()) == 1
    hub.requests.clear()
    offline = _program(constants.ENDPOINT, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert not hub.requests
    shutil.rmtree(FOLDER)
    offline = _program(constants.ENDPOINT, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert "Traceback" not in offline.stderr


def test_the_token_goes_to_the_hub_alone(hub: FakeHub):
    """Files come from another host, which must not see the token; no output or file may have it."""
    token = "hf_" + "s3cret" * 5
    store = FakeHub(hub.files)
    with serving(store) as address:
        hub.redirect = address
        good = _program(constants.ENDPOINT, "--json", HF_TOKEN=token)
        hub.refusal = 401, ""
        bad = _program(constants.ENDPOINT, HF_TOKEN=token, GPTJ_DEBUG="1")
    assert good.returncode == 0, good.stderr
    assert set(hub.authorizations) == {f"Bearer {token}"}
    assert set(store.authorizations) == {None}
    assert store.fetched == {"config.json", "model.safetensors", *SMALL_FILES}
    assert bad.returncode == 1
    assert "401" in bad.stderr
    assert token not in good.stdout + good.stderr + bad.stdout + bad.stderr
    for path in Path.cwd().rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes()
