"""What the benchmark does to, and reads from, the host: warm memory, random content, /proc.

The rule of the file: memory that the host does not back (never touched, or free for some seconds) costs up to ten times
as much at the next touch, so as much as a destination needs is populated and given back right before each measurement,
for every competitor alike.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from migrated.kernel.memory import PAGE_SIZE, create_memfd

MIB = 1 << 20
GIB = 1 << 30
_STEP = 4 * MIB


#: The kernel does not hand out exactly what was given back last; twice as much makes it likely.
_SPARE = 2


def warm(size_bytes: int) -> None:
    """Let the host back that much memory and some, then give it back to the kernel."""
    fd = create_memfd("warm", _SPARE * size_bytes)
    try:
        block = bytes(_STEP)
        for offset in range(0, _SPARE * size_bytes, _STEP):
            os.pwrite(fd, block, offset)
    finally:
        os.close(fd)


@contextmanager
def random_file(directory: Path, size_bytes: int, *, zero_bytes: int = 0) -> Iterator[Path]:
    """Make a file in memory whose content cannot be compressed (behind ``zero_bytes`` of nothing)."""
    path = directory / f"content-{size_bytes}-{zero_bytes}"
    generator = np.random.default_rng(42)
    try:
        with path.open("wb") as file:
            file.truncate(size_bytes)
            file.seek(zero_bytes)
            for start in range(zero_bytes, size_bytes, _STEP):
                file.write(generator.bytes(min(_STEP, size_bytes - start)))
        yield path
    finally:
        path.unlink(missing_ok=True)


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used, in the kernel's steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, object]:
    """Return what the numbers depend on."""
    with Path("/proc/cpuinfo").open() as cpuinfo:
        models = {line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")}
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "cpu": sorted(models),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE,
        "load_average": os.getloadavg(),
    }


def own_memory_bytes(pid: int) -> int:
    """Return a process's resident memory without the shared RAM it maps: anonymous pages and files."""
    fields = _status(Path(f"/proc/{pid}"))
    return (int(fields["RssAnon"].split()[0]) + int(fields["RssFile"].split()[0])) * 1024


def anonymous_bytes(pid: int) -> int:
    """Return a process's resident anonymous memory."""
    return int(_status(Path(f"/proc/{pid}"))["RssAnon"].split()[0]) * 1024


def voluntary_switches(pid: int) -> int:
    """Return how often all threads of a process gave the processor up: each is one wakeup."""
    return sum(int(_status(task).get("voluntary_ctxt_switches", "0")) for task in Path(f"/proc/{pid}/task").iterdir())


def _status(directory: Path) -> dict[str, str]:
    lines = (directory / "status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)
