"""What the host can still give, read from files like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.kernel.host_memory import UNLIMITED, available_bytes

MEMINFO = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    8000 kB\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    return proc


def group(path: Path, most: str, current: int, stat: str = "") -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(f"{most}\n")
    (path / "memory.current").write_text(f"{current}\n")
    (path / "memory.stat").write_text(stat)


def test_of_the_host(proc: Path, tmp_path: Path) -> None:
    assert available_bytes(proc, tmp_path / "none") == 8000 << 10


def test_of_the_tightest_group_above(proc: Path, tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    (proc / "self" / "cgroup").write_text("1:name=x:/elsewhere\n0::/slice/unit\n")
    group(root / "slice", "1000000", 900000, "anon 5\ninactive_file 50000\n")
    group(root / "slice" / "unit", "max", 800000)
    assert available_bytes(proc, root) == 150_000
    group(root / "slice", "1000000", 2_000_000)
    assert available_bytes(proc, root) == 0


def test_what_cannot_be_read_limits_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) == UNLIMITED
    (tmp_path / "meminfo").write_text("MemFree: 3 kB\n")
    assert available_bytes(tmp_path, tmp_path) == UNLIMITED


def test_of_this_host() -> None:
    assert 0 < available_bytes() < UNLIMITED
