"""What the machine reports, under limits that a container sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptj_convert.resources import machine


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replace /proc and /sys/fs/cgroup by folders with these files."""

    def make(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    make({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:     1000 kB\n"})
    return make


def test_without_limits(system):
    assert machine.memory_available() == 1_024_000
    assert machine.memory_total() > 2**28
    assert machine.cpu_features() == frozenset()
    assert machine.file_system(Path()) == ""


def test_limits_of_version_2_count_in_every_group_around(system):
    system(
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "cgroup/outer/memory.max": "600000\n",
            "cgroup/outer/memory.current": "500000\n",
            "cgroup/outer/memory.stat": "anon 1\ninactive_file 100000\n",
            "cgroup/outer/inner/memory.max": "max\n",
            "cgroup/outer/inner/memory.current": "1\n",
            "cgroup/outer/inner/cpu.max": "50000 100000\n",
            "cgroup/outer/cpu.max": "max 100000\n",
        }
    )
    assert machine.memory_total() == 600_000
    assert machine.memory_available() == 200_000
    assert machine.cores() == 0.5


def test_limits_of_version_1(system):
    system(
        {
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n2:pids:/job\n",
            "cgroup/memory/job/memory.limit_in_bytes": "700000\n",
            "cgroup/memory/job/memory.usage_in_bytes": "100000\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/memory.usage_in_bytes": "5\n",
            "cgroup/cpu/job/cpu.cfs_quota_us": "25000\n",
            "cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        }
    )
    assert machine.memory_total() == 700_000
    assert machine.memory_available() == 600_000
    assert machine.cores() == 0.25


def test_a_container_sees_its_own_group_as_the_root(system):
    system(
        {
            "proc/self/cgroup": "0::/outside/path\n",
            "cgroup/memory.max": "600000\n",
            "cgroup/memory.current": "100000\n",
        }
    )
    assert machine.memory_available() == 500_000


def test_the_innermost_mount_says_the_file_system(system, tmp_path: Path):
    system(
        {"proc/self/mounts": f"/ / ext4 rw 0 0\ntmp {tmp_path} tmpfs rw 0 0\nx {tmp_path}x xfs\n"}
    )
    assert machine.file_system(tmp_path / "below") == "tmpfs"
    assert machine.file_system(Path("/")) == "ext4"


def test_direct_io_leaves_nothing(tmp_path: Path):
    assert machine.direct_io(tmp_path) in (True, False)
    assert not list(tmp_path.iterdir())
