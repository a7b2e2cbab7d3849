"""Conversions killed, stopped and refused by the system at single calls: nothing is lost.

strace makes a process die, or a call fail, at the n-th call of a kind that changes the disk. What
resumes runs in this process, which starts no interpreter for it.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from tests.conftest import GOLDEN_RUNS, make_checkpoint
from tests.e2e.tracing import needs_strace, started, traced
from tests.public_layout import write_public_bin

pytestmark = needs_strace

CHANGING = (
    "write,pwrite64,fallocate,ftruncate,fsync,rename,unlink,unlinkat,mkdir,rmdir,copy_file_range"
)
CONVERT = ("convert", "hf", "--to", "tf")
#: Blocks and strips far smaller than the tensors, as in a large checkpoint.
SMALL_PIECES = (
    "from gptj_convert.streams import strips, writer; "
    "strips.PANEL_BYTES = 4096; strips.STRIP_BYTES = 20_000; writer.BLOCK_BYTES = 32768; "
)


def _traced(inject: str, *options: str) -> subprocess.CompletedProcess[str]:
    return traced(*CONVERT, *options, calls=CHANGING, inject=inject, before=SMALL_PIECES)


def _calls() -> list[str]:
    """Kinds of the calls of the last traced run, from its first on a file of the output."""
    calls = re.findall(r"^\d+ +(\w+)\(", Path("trace").read_text(), re.MULTILINE)
    return [c for c in calls if c in CHANGING.split(",")]


def _content(folder: str) -> dict[str, bytes]:
    found = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    manifest = json.loads(found.pop("manifest.json"))
    found["manifest.json"] = json.dumps(manifest, sort_keys=True).encode()
    return found


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with `hf` and the trace of its conversion, and what that wrote."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "work"
    make_checkpoint(folder / "hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert _traced("").returncode == 0
        found = _content("converted")
        shutil.rmtree("converted")
    shutil.copytree(folder, folder.with_name("kept"))
    return folder, found


@pytest.fixture
def whole(uninterrupted: tuple[Path, dict[str, bytes]], monkeypatch) -> dict[str, bytes]:
    """The result of an uninterrupted run, its source ./hf, and ./trace.

    The folder is the same for all tests, as a manifest states where its source lies.
    """
    folder, found = uninterrupted
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("kept"), folder)
    monkeypatch.chdir(folder)
    return found


def _points(calls: list[str], count: int) -> list[tuple[str, int]]:
    """Kind and number within the kind of `count` calls, evenly spread from another one each time;
    0 means all."""
    numbered, seen = [], dict.fromkeys(calls, 0)
    for kind in calls:
        seen[kind] += 1
        numbered.append((kind, seen[kind]))
    step = max(1, len(numbered) // count) if count else 1
    return numbered[random.randrange(step) :: step]


def _kill_everywhere(gptj, whole: dict[str, bytes], count: int, *options: str) -> None:
    """Kill the conversion at `count` of its calls, each time from the start, and resume it."""
    calls = _calls()
    assert len(calls) > 60
    for kind, n in _points(calls, count):
        shutil.rmtree("converted", ignore_errors=True)
        shutil.rmtree("converted.partial-gptj", ignore_errors=True)
        if options:
            Path("converted").mkdir()
            (Path("converted") / "old").write_text("old")
        done = _traced(f"{kind}:signal=KILL:when={n}", *options)
        where = f"{kind} {n}: {done.stderr}"
        if Path("converted").exists():
            assert (options and {*_content_names()} == {"old"}) or _content("converted") == whole
        resumed = gptj(*CONVERT, "--resume")
        if options and {*_content_names()} == {"old"}:
            # Killed before there was anything to resume: the old output is untouched.
            assert resumed.code == 2, where
            assert "--force" in resumed.stderr
            continue
        assert resumed.code == 0, where + resumed.stderr
        assert _content("converted") == whole, where
        assert not Path("converted.partial-gptj").exists(), where


def _content_names() -> list[str]:
    return [p.name for p in Path("converted").iterdir()] if Path("converted").exists() else []


def test_killed_at_some_calls(whole: dict[str, bytes], gptj):
    _kill_everywhere(gptj, whole, 10)


@pytest.mark.full
def test_killed_at_every_call(whole: dict[str, bytes], gptj):
    _kill_everywhere(gptj, whole, 0)


def test_killed_while_transposed_weights_are_read(whole: dict[str, bytes], gptj):
    """The public model's own layout, whose weights are copied to TensorFlow unchanged."""
    write_public_bin(Path("hf"))
    assert _traced("").returncode == 0
    public = _content("converted")
    shutil.rmtree("converted")
    (data,) = (name for name in public if ".data-" in name)
    assert public[data] == whole[data]
    _kill_everywhere(gptj, public, 4)


def test_killed_while_replacing(whole: dict[str, bytes], gptj):
    _kill_everywhere(gptj, whole, 4, "--force")


def test_killed_while_moments_are_written(workdir: Path, gptj):
    shutil.copytree(GOLDEN_RUNS / "adamw" / "ckpt", "hf")
    for name in ("params.yaml", "hf/config.json"):
        shutil.copy(GOLDEN_RUNS / "adamw" / name, "hf")
    Path("hf/checkpoint").write_text('model_checkpoint_path: "model.ckpt-20"\n')
    options = ("--to", "hf", "--out", "converted", "--optimizer-state")
    assert _traced("", *options).returncode == 0
    whole, writes = _content("converted"), _calls().count("pwrite64")
    for n in (writes // 2, writes - 2):
        shutil.rmtree("converted", ignore_errors=True)
        _traced(f"pwrite64:signal=KILL:when={n}", *options)
        assert not Path("converted").exists()
        resumed = gptj(*CONVERT, *options, "--resume")
        assert resumed.code == 0, resumed.stderr
        assert _content("converted") == whole


def test_what_was_done_is_not_done_again(whole: dict[str, bytes], gptj):
    writes = _calls().count("pwrite64")
    _traced(f"pwrite64:signal=KILL:when={writes - 3}")
    resumed = gptj(*CONVERT, "--resume", "--json")
    fields = resumed.json
    assert fields["kept_bytes"] > fields["target_bytes"] / 2
    assert "of the interrupted run" in resumed.stderr
    assert _content("converted") == whole


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
def test_stopped_by_a_signal(name: str, code: int, whole: dict[str, bytes], gptj):
    done = _traced(f"pwrite64:signal={name}:when=9")
    assert done.returncode == code, done.stderr
    assert "hint: run the same command with --resume to reuse what is done" in done.stderr
    assert not Path("converted").exists()
    again = gptj(*CONVERT)
    assert again.code == 2
    assert "--resume" in again.stderr
    assert "--force" in again.stderr
    assert gptj(*CONVERT, "--resume").code == 0
    assert _content("converted") == whole


KINDS = ("pwrite64", "fallocate", "fsync", "rename", "mkdir")
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
#: A full disk at every kind of call, and each other error at one of them.
OFTEN = {("ENOSPC", kind) for kind in KINDS} | set(zip(ERRORS, KINDS, strict=False))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.full)
        for pair in product(ERRORS, KINDS)
    ],
)
def test_a_call_that_fails(error: str, kind: str, whole: dict[str, bytes], gptj):
    last = _calls().count(kind)
    done = _traced(f"{kind}:error={error}:when={last}")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert not Path("converted").exists()
    assert gptj(*CONVERT, "--resume").code == 0
    assert _content("converted") == whole


def test_another_job_is_not_resumed(whole: dict[str, bytes], gptj):
    _traced("pwrite64:signal=KILL:when=9")
    other = gptj(*CONVERT, "--resume", "--dtype", "float16")
    assert other.code == 2
    assert "a different one" in other.stderr
    weights = Path("hf/model.safetensors")
    weights.write_bytes(weights.read_bytes())
    changed = gptj(*CONVERT, "--resume")
    assert changed.code == 1
    assert "has changed since" in changed.stderr
    assert gptj(*CONVERT, "--force").code == 0
    assert _content("converted") == whole


def test_no_rename_before_what_it_names_is_on_the_disk(whole: dict[str, bytes]):
    """Every file and the folder are synced before the folder is renamed, its parent after."""
    done = traced(*CONVERT, calls="pwrite64,write,fsync,rename", before=SMALL_PIECES)
    assert done.returncode == 0
    dirty, synced_after = set(), []
    renamed = False
    for line in Path("trace").read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((?:\d+<([^>]*)>|\"([^\"]*)\")", line)
        if not call:
            continue
        kind, path = call[1], call[2] or call[3]
        if kind in ("pwrite64", "write") and "/content/" in path:
            dirty.add(path)
            assert not renamed
        elif kind == "fsync":
            dirty.discard(path)
            if renamed:
                synced_after.append(path)
        elif kind == "rename":
            assert not dirty, dirty
            renamed = path.endswith("/content")  # the journal takes its name before
    assert renamed
    assert synced_after == [str(Path.cwd())]


def test_two_at_once(whole: dict[str, bytes], gptj):
    """The second conversion is refused at once, and the error names the first."""
    slow = "fsync:delay_enter=3000000"
    with started(*CONVERT, calls="fsync", inject=slow) as first:
        assert first.stderr
        first.stderr.readline()  # the plan is made
        while not list(Path.cwd().glob("converted.partial-gptj/journal.jsonl")):
            assert first.poll() is None
        second = gptj(*CONVERT)
        assert second.code == 1
        assert re.search(r"process \d+ is writing it", second.stderr)
        first.kill()


def test_a_planted_link_is_not_followed(whole: dict[str, bytes], gptj):
    Path("elsewhere").mkdir()
    Path("converted.partial-gptj").symlink_to("elsewhere")
    done = gptj(*CONVERT)
    assert done.code == 2
    assert "is not a folder" in done.stderr
    assert not list(Path("elsewhere").iterdir())
