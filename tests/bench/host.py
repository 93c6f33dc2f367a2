"""What the benchmark does to, and reads from, the host: warm memory, random content, /proc.

The rule of the file: memory that the host does not back (never touched, or free for some seconds) costs up to ten times
as much at the next touch, so as much as a destination needs is populated and given back right before each measurement,
for every competitor alike.
"""

from __future__ import annotations

import os
import platform
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from migrated.kernel.memory import PAGE_SIZE, create_memfd

MIB = 1 << 20
GIB = 1 << 30
_STEP = 4 * MIB
#: For programs, page tables and whatever else runs on the machine: a case may not take the last of its memory.
RESERVE_BYTES = 4 * GIB
#: How often `watching` looks.
SAMPLE_EVERY_S = 0.02


#: The kernel does not hand out exactly what was given back last; twice as much makes it likely.
_SPARE = 2


def warm(size_bytes: int, spare: int = _SPARE) -> None:
    """Let the host back that much memory and some, then give it back to the kernel."""
    fd = create_memfd("warm", spare * size_bytes)
    try:
        populate(fd, spare * size_bytes)
    finally:
        os.close(fd)


def available_bytes() -> int:
    """Return how much memory the kernel could hand out now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def populate(fd: int, size_bytes: int) -> None:
    """Have a memfd's pages all there, as zeros."""
    block = bytes(_STEP)
    for offset in range(0, size_bytes, _STEP):
        os.pwrite(fd, block[: size_bytes - offset], offset)


@contextmanager
def text_file(directory: Path, size_bytes: int) -> Iterator[Path]:
    """Make a file in memory that can be compressed as a log can: lines with numbers in them."""
    path = directory / f"text-{size_bytes}"
    generator = np.random.default_rng(42)
    numbers = generator.integers(0, 1 << 31, size=(_STEP // 64, 3))
    lines = "".join(f"2026-01-01T00:00:{a % 60:02} host daemon[{b % 9999}]: took {c} us\n" for a, b, c in numbers)
    with _filled(path, size_bytes, lambda _: lines.encode()[:_STEP]) as filled:
        yield filled


@contextmanager
def repeated_file(directory: Path, size_bytes: int) -> Iterator[Path]:
    """Make a file in memory of the same random 4 MiB over and over: fast to make, and nothing compresses it here."""
    block = np.random.default_rng(42).bytes(_STEP)
    with _filled(directory / f"repeated-{size_bytes}", size_bytes, lambda _: block) as filled:
        yield filled


@contextmanager
def _filled(path: Path, size_bytes: int, block: Callable[[int], bytes]) -> Iterator[Path]:
    try:
        with path.open("wb") as file:
            for start in range(0, size_bytes, _STEP):
                piece = block(start)
                while len(piece) < _STEP:
                    piece += piece
                file.write(piece[: min(_STEP, size_bytes - start)])
        yield path
    finally:
        path.unlink(missing_ok=True)


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


def cpu_s(*pids: int) -> float:
    """Return the processor time that processes have used together, each in the kernel's steps of 10 ms."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def watching(look: Callable[[int], int], pids: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Keep the highest of what ``look`` says of each process in the block."""
    most = dict.fromkeys(pids, 0)
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def watch() -> None:
        while True:
            for name, pid in pids.items():
                most[name] = max(most[name], look(pid))
            try:
                done.get(timeout=SAMPLE_EVERY_S)
            except queue.Empty:
                continue
            return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.put(None)
        watcher.join()


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
