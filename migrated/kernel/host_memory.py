"""How much memory this host can still give.

The rule of the file: an estimate of the kernel's, not a promise; what cannot be read limits nothing. Source: proc(5)
/proc/meminfo, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
#: What is said where nothing can be read.
UNLIMITED = 1 << 62


def available_bytes(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Return what can be had without swapping: of the host, and of every control group that this process is in."""
    return min([_meminfo(proc / "meminfo"), *_group_rooms(proc / "self" / "cgroup", cgroup)])


def _meminfo(path: Path) -> int:
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return UNLIMITED


def _group_rooms(membership: Path, root: Path) -> Iterator[int]:
    """Yield the room in this process's control group and in each one above it (version 2 only)."""
    for line in _read(membership).splitlines():
        if line.startswith("0::/"):
            group = root / line.removeprefix("0::/")
            yield from (_room(one) for one in (group, *group.parents) if one == root or root in one.parents)


def _room(group: Path) -> int:
    most, current = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
    if not most.isdigit() or not current.isdigit():
        return UNLIMITED
    # Pages of files that nobody uses are given back before anybody is killed.
    stat = dict(line.split()[:2] for line in _read(group / "memory.stat").splitlines())
    return max(int(most) - int(current) + int(stat.get("inactive_file", "0")), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
