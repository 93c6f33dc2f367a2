"""Huge pages for a test: real ones, asked of the kernel, and given back.

The rule of the file: the host has afterwards as many as it had before. One test of the host at a time has some.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrated.kernel.huge_pages import free_huge_pages

_WANTED = Path("/proc/sys/vm/nr_hugepages")


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have ``count`` free huge pages of 2 MiB inside the ``with`` block; skip where the kernel gives none."""
    lock = os.open(Path(tempfile.gettempdir()) / "huge-pages.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(_WANTED.read_text())
        try:
            _WANTED.write_text(str(before + count))
            if free_huge_pages() < count:
                pytest.skip(f"the kernel gives only {free_huge_pages()} of {count} huge pages")
            yield
        except PermissionError:
            pytest.skip("huge pages can be reserved by root only")
        finally:
            if int(_WANTED.read_text()) != before:
                _WANTED.write_text(str(before))
    finally:
        os.close(lock)


def huge_bytes_of(pid: int) -> int:
    """Return how much memory in huge pages a process has mapped and touched (HugetlbPages)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("HugetlbPages:")).split()[1]) << 10
