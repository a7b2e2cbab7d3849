"""Conversions killed, stopped and refused by the system at single calls: nothing is lost.

strace makes a process die, or a call fail, at the n-th call of a kind that changes the disk.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import GOLDEN_RUNS, make_checkpoint
from tests.public_layout import write_public_bin

pytestmark = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "strace -V"], capture_output=True).returncode != 0,
    reason="needs strace",
)

CHANGING = (
    "write,pwrite64,fallocate,ftruncate,fsync,rename,unlink,unlinkat,mkdir,rmdir,copy_file_range"
)
CONVERT = (sys.executable, "-B", "-m", "runner.cli.root", "convert", "hf", "--to", "tf")
#: Blocks and strips far smaller than the tensors, as in a large checkpoint.
SMALL_PIECES = (
    "import sys; from gptj_convert.streams import strips, writer; "
    "strips.PANEL_BYTES = 4096; strips.STRIP_BYTES = 20_000; writer.BLOCK_BYTES = 32768; "
    "from runner.cli.root import main; sys.exit(main())"
)


def _traced(inject: str, *options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-B", "-c", SMALL_PIECES, *CONVERT[4:]]
    strace = ["strace", "-f", "-qqq", "-o", "trace", "-e", f"trace={CHANGING}"]
    strace += ["-e", "signal=none", *(["-e", f"inject={inject}"] if inject else [])]
    return subprocess.run([*strace, *program, *options], capture_output=True, text=True)


def _calls() -> list[str]:
    """Kinds of the calls of the last traced run, from its first on a file of the output."""
    calls = re.findall(r"^\d+ +(\w+)\(", Path("trace").read_text(), re.MULTILINE)
    return [c for c in calls if c in CHANGING.split(",")]


def _content(folder: str) -> dict[str, bytes]:
    found = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    manifest = json.loads(found.pop("manifest.json"))
    found["manifest.json"] = json.dumps(manifest, sort_keys=True).encode()
    return found


@pytest.fixture
def whole(workdir: Path) -> dict[str, bytes]:
    """The result of an uninterrupted run, and its source ./hf."""
    make_checkpoint(workdir / "hf")
    assert _traced("").returncode == 0
    found = _content("converted")
    shutil.rmtree("converted")
    return found


def _points(calls: list[str], count: int) -> list[tuple[str, int]]:
    """Kind and number within the kind of `count` calls, evenly spread; 0 means all."""
    numbered, seen = [], dict.fromkeys(calls, 0)
    for kind in calls:
        seen[kind] += 1
        numbered.append((kind, seen[kind]))
    step = max(1, len(numbered) // count) if count else 1
    return numbered[::step]


def _kill_everywhere(whole: dict[str, bytes], count: int, *options: str) -> None:
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
        resumed = subprocess.run([*CONVERT, "--resume"], capture_output=True, text=True)
        if options and {*_content_names()} == {"old"}:
            # Killed before there was anything to resume: the old output is untouched.
            assert resumed.returncode == 2, where
            assert "--force" in resumed.stderr
            continue
        assert resumed.returncode == 0, where + resumed.stderr
        assert _content("converted") == whole, where
        assert not Path("converted.partial-gptj").exists(), where


def _content_names() -> list[str]:
    return [p.name for p in Path("converted").iterdir()] if Path("converted").exists() else []


def test_killed_at_twenty_calls(whole: dict[str, bytes]):
    _kill_everywhere(whole, 20)


@pytest.mark.full
def test_killed_at_every_call(whole: dict[str, bytes]):
    _kill_everywhere(whole, 0)


def test_killed_while_transposed_weights_are_read(whole: dict[str, bytes]):
    """The public model's own layout, whose weights are copied to TensorFlow unchanged."""
    write_public_bin(Path("hf"))
    assert _traced("").returncode == 0
    public = _content("converted")
    shutil.rmtree("converted")
    (data,) = (name for name in public if ".data-" in name)
    assert public[data] == whole[data]
    _kill_everywhere(public, 8)


def test_killed_while_replacing(whole: dict[str, bytes]):
    _kill_everywhere(whole, 8, "--force")


def test_killed_while_moments_are_written(workdir: Path):
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
        resumed = subprocess.run([*CONVERT, *options, "--resume"], capture_output=True)
        assert resumed.returncode == 0, resumed.stderr
        assert _content("converted") == whole


def test_what_was_done_is_not_done_again(whole: dict[str, bytes]):
    writes = _calls().count("pwrite64")
    _traced(f"pwrite64:signal=KILL:when={writes - 3}")
    resumed = subprocess.run([*CONVERT, "--resume", "--json"], capture_output=True, text=True)
    fields = json.loads(resumed.stdout)
    assert fields["kept_bytes"] > fields["target_bytes"] / 2
    assert "of the interrupted run" in resumed.stderr
    assert _content("converted") == whole


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
def test_stopped_by_a_signal(name: str, code: int, whole: dict[str, bytes]):
    done = _traced(f"pwrite64:signal={name}:when=9")
    assert done.returncode == code, done.stderr
    assert "hint: run the same command with --resume to reuse what is done" in done.stderr
    assert not Path("converted").exists()
    again = subprocess.run(CONVERT, capture_output=True, text=True)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert "--force" in again.stderr
    assert subprocess.run([*CONVERT, "--resume"], capture_output=True).returncode == 0
    assert _content("converted") == whole


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT", "EROFS"])
@pytest.mark.parametrize("kind", ["pwrite64", "fallocate", "fsync", "rename", "mkdir"])
def test_a_call_that_fails(error: str, kind: str, whole: dict[str, bytes]):
    last = _calls().count(kind)
    done = _traced(f"{kind}:error={error}:when={last}")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert not Path("converted").exists()
    assert subprocess.run([*CONVERT, "--resume"], capture_output=True).returncode == 0
    assert _content("converted") == whole


def test_another_job_is_not_resumed(whole: dict[str, bytes]):
    _traced("pwrite64:signal=KILL:when=9")
    other = subprocess.run(
        [*CONVERT, "--resume", "--dtype", "float16"], capture_output=True, text=True
    )
    assert other.returncode == 2
    assert "a different one" in other.stderr
    weights = Path("hf/model.safetensors")
    weights.write_bytes(weights.read_bytes())
    changed = subprocess.run([*CONVERT, "--resume"], capture_output=True, text=True)
    assert changed.returncode == 1
    assert "has changed since" in changed.stderr
    assert subprocess.run([*CONVERT, "--force"], capture_output=True).returncode == 0
    assert _content("converted") == whole


def test_no_rename_before_what_it_names_is_on_the_disk(whole: dict[str, bytes]):
    """Every file and the folder are synced before the folder is renamed, its parent after."""
    program = [sys.executable, "-B", "-c", SMALL_PIECES, *CONVERT[4:]]
    trace = ["strace", "-f", "-y", "-qqq", "-o", "trace", "-e", "trace=pwrite64,write,fsync,rename"]
    assert subprocess.run([*trace, *program], capture_output=True).returncode == 0
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


def test_two_at_once(whole: dict[str, bytes]):
    """The second conversion is refused at once, and the error names the first."""
    with subprocess.Popen(
        ["strace", "-f", "-qqq", "-o", "trace", "-e", "trace=fsync",
         "-e", "inject=fsync:delay_enter=3000000", *CONVERT],
        stderr=subprocess.PIPE, text=True,
    ) as first:  # fmt: skip
        assert first.stderr
        first.stderr.readline()  # the plan is made
        while not list(Path.cwd().glob("converted.partial-gptj/journal.jsonl")):
            assert first.poll() is None
        second = subprocess.run(CONVERT, capture_output=True, text=True)
        assert second.returncode == 1
        assert re.search(r"process \d+ is writing it", second.stderr)
        first.kill()


def test_a_planted_link_is_not_followed(whole: dict[str, bytes]):
    Path("elsewhere").mkdir()
    Path("converted.partial-gptj").symlink_to("elsewhere")
    done = subprocess.run(CONVERT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not a folder" in done.stderr
    assert not list(Path("elsewhere").iterdir())
