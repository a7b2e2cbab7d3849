"""Facts about this machine, one function per fact. The standard library only.

Limits that a container sets count as the machine's own.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
#: About the number of bytes that a version 1 cgroup reports when it has no limit.
_NO_LIMIT = 2**60
#: CPU feature, by Linux's name, that computes with each 16-bit dtype without widening numbers
#: first.
HALF_PRECISION = {"float16": "avx512_fp16", "bfloat16": "avx512_bf16"}


def memory_total() -> int:
    """Return the bytes of memory that this process may ever use."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([installed, *(limit for limit, _ in _memory_limits())])


def memory_available() -> int:
    """Return the bytes of memory that are available now: free, or held by pages that can be read
    again."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(_PROC / "meminfo"), re.MULTILINE)
    free = int(found[1]) * 1024 if found else memory_total()
    return max(0, min([free, *(limit - used for limit, used in _memory_limits())]))


def peak_rss() -> int | None:
    """Return the largest number of bytes that were resident at once in this process, mapped pages
    included."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", _text(_PROC / "self/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def cores() -> float:
    """Return the number of CPU cores that this process may use."""
    allowed = float(len(os.sched_getaffinity(0)))
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        quota = quota or _text(folder / "cpu.cfs_quota_us")
        period = period or _text(folder / "cpu.cfs_period_us")
        if _is_number(quota) and _is_number(period) and int(period):
            allowed = min(allowed, int(quota) / int(period))
    return allowed


def cpu_features() -> frozenset[str]:
    """Return the CPU's features under Linux's names, such as `avx2`."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _text(_PROC / "cpuinfo"), re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def cpu_name() -> str:
    """Return the CPU's name; empty if it is not known."""
    found = re.search(r"^model name\s*:(.*)$", _text(_PROC / "cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else ""


def disk_free(folder: Path) -> int:
    """Return the bytes that may still be written below a folder."""
    return shutil.disk_usage(folder).free


def file_system(folder: Path) -> str:
    """Return the file system type of a folder; empty if it is not known."""
    place, best, kind = os.path.realpath(folder), "", ""
    for line in _text(_PROC / "self/mounts").splitlines():
        fields = line.split(" ")
        mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[1])
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):  # a later mount hides an earlier one
            best, kind = mount, fields[2]
    return kind


def direct_io(folder: Path) -> bool:
    """Return whether files in a folder can be written around the page cache. Creates a file and
    removes it.

    Raises:
        OSError: the folder is not writable.
    """
    fd, name = tempfile.mkstemp(dir=folder, prefix=".gptj-doctor-")
    try:
        os.close(os.open(name, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC))
    except (OSError, AttributeError):
        return False
    finally:
        os.close(fd)
        Path(name).unlink()
    return True


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield bytes allowed and in use, for every control group around this process that has a
    limit."""
    for folder in _cgroup_folders("memory"):
        for limit, usage, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            texts = [_text(folder / name).strip() for name in (limit, usage)]
            if not all(map(_is_number, texts)) or int(texts[0]) > _NO_LIMIT:
                continue
            stat = _text(folder / "memory.stat")
            cached = re.search(rf"^{inactive} (\d+)$", stat, re.MULTILINE)
            yield int(texts[0]), int(texts[1]) - (int(cached[1]) if cached else 0)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups of this process, of either version, from the inside
    out."""
    for line in _text(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CGROUPS / controller if controllers else _CGROUPS
        inner = root / path.lstrip("/")
        # A container may see its own group as the root, under the path that it has outside.
        yield from (p for p in (inner, *inner.parents) if p == root or root in p.parents)


def _is_number(text: str) -> bool:
    return text.strip().isascii() and text.strip().isdigit()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
