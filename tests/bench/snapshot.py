"""Snapshots of 2 GiB that cannot be compressed, onto the disk and back, against dd and against a QEMU.

The rule of the file: the same bytes, the same disk, and an empty queue: before each run the files of the one before are
gone and the disk has nothing left to write. Saving is over when the bytes are on the disk, for dd (``conv=fsync``) and
for us; a QEMU's ``exec:cat > file`` is over when they are in the page cache, so it is also measured with an fsync. What
is loaded lies in the page cache for everybody (it was read just before), and the memory it goes to is cold; once more
with the stream on the disk only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from migrated.control.client import QmpClient
from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file, warm
from tests.bench.processes import DEADLINE_S, BenchError
from tests.bench.site import site

SIZE_BYTES = 2 * GIB
#: Kept across reboots, so not in memory.
DISK = Path("/var/tmp")
#: As often as a QEMU is asked whether it has loaded.
POLL_S = 0.005
TAG = "bench"

_SAVE = "RAM bytes / time until they are on the disk (a QEMU: in the page cache; fsync: on the disk)"
_LOAD = "RAM bytes / time until the machine runs; cold memory, stream in the page cache (from disk: not there)"


def run(bench: Bench) -> list[Figure]:
    """Measure rounds of dd, a save and a load of ours, and those of a QEMU."""
    what = "snapshot of 2 GiB"
    figures = {
        "dd": Figure("snapshot", f"save, {what}", "MiB/s", _SAVE, Target(">=", 0.7), "dd"),
        "qemu": Figure("snapshot", f"save, {what}", "MiB/s", _SAVE, Target(">=", 1.0), "qemu"),
        "qemu fsync": Figure("snapshot", f"save, {what}", "MiB/s", _SAVE, None, "qemu fsync"),
        "qemu load": Figure("snapshot", f"load, {what}", "MiB/s", _LOAD, Target(">=", 1.0), "qemu load"),
        "qemu load from disk": Figure(
            "snapshot", f"load from disk, {what}", "MiB/s", _LOAD, None, "qemu load from disk"
        ),
    }
    with (
        tempfile.TemporaryDirectory(prefix="migrated-bench-", dir=DISK) as name,
        random_file(bench.memory, SIZE_BYTES) as content,
    ):
        disk = Path(name)
        competitors = {"dd": lambda: {"dd": _dd(disk, content)}, "migrated": lambda: _ours(bench, disk, content)}
        if bench.qemu:
            competitors["qemu"] = lambda: _qemu(bench, disk, content)
        for result in bench.rounds("snapshot", competitors):
            found = {name: value for one in result.values() for name, value in one.items()}
            for theirs, figure in figures.items():
                if theirs in found:
                    figure.pair(found[theirs.removeprefix("qemu ") if "load" in theirs else "save"], found[theirs])
    return [figure for figure in figures.values() if figure.ours]


@contextmanager
def _idle_disk() -> Iterator[None]:
    """Nothing is left to write before, and nothing afterwards; the page cache has memory that the host backs."""
    os.sync()
    warm(SIZE_BYTES)
    yield
    os.sync()


def _read(path: Path) -> None:
    """Have the page cache hold a file."""
    with path.open("rb", buffering=0) as file:
        while file.readinto(bytearray(4 * MIB)):
            pass


def _forget(path: Path) -> None:
    """Have the page cache drop a file that the disk has."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


#: What happens to a stream before it is loaded.
_LOADS = {"load": _read, "load from disk": _forget}


def _rate(seconds: float) -> float:
    return SIZE_BYTES / MIB / seconds


def _dd(disk: Path, content: Path) -> float:
    target = disk / "dd"
    with _idle_disk():
        began = time.monotonic()
        command = ["dd", f"if={content}", f"of={target}", "bs=1M", "conv=fsync", "status=none"]
        subprocess.run(command, check=True)
        took = time.monotonic() - began
        target.unlink()
    return _rate(took)


def _ours(bench: Bench, disk: Path, content: Path) -> dict[str, float]:
    with site(disk, "source", SIZE_BYTES, ["--content", content]) as source, _idle_disk():
        saved = _job(source.qmp, "snapshot-save")
        path = Path(source.qmp.execute("x-migrated-query-snapshots")[0]["path"])
    found = {"save": _rate(saved)}
    for name, prepare in _LOADS.items():
        with site(disk, "target", SIZE_BYTES, incoming=True) as target:
            shelf = target.socket.parents[1] / "state" / "snapshots"
            shelf.mkdir()
            path = path.rename(shelf / TAG)
            warm(SIZE_BYTES)
            prepare(path / "stream")
            found[name] = _rate(_job(target.qmp, "snapshot-load"))
    for home in disk.glob("*-*"):
        shutil.rmtree(home)
    return found


def _job(qmp: QmpClient, command: str) -> float:
    """Run a job and return how long it took."""
    began = time.monotonic()
    qmp.execute(command, {"job-id": "bench", "tag": TAG})
    while (event := qmp.next_event()) is not None:
        if event["event"] == "JOB_STATUS_CHANGE" and event["data"]["status"] == "concluded":
            took = time.monotonic() - began
            if error := qmp.execute("query-jobs")[0].get("error"):
                raise BenchError(f"{command}: {error}")
            qmp.execute("job-dismiss", {"id": "bench"})
            return took
    raise BenchError(f"{command}: the daemon is gone")


def _qemu(bench: Bench, disk: Path, content: Path) -> dict[str, float]:
    memory = ["-m", str(SIZE_BYTES // MIB)]
    stream = disk / "qemu"
    found = {}
    for name, command in (("qemu fsync", f"cat > {stream} && sync {stream}"), ("qemu", f"cat > {stream}")):
        stream.unlink(missing_ok=True)
        arguments = [*qemu.EMPTY, *memory, *qemu.backend_file(content, SIZE_BYTES), "-S"]
        with qemu.qemu(bench.directory, "qemu-save", arguments) as source, _idle_disk():
            source.execute("migrate-set-parameters", {"max-bandwidth": qemu.UNLIMITED_BPS})
            source.execute("migrate", {"uri": f"exec:{command}"})
            found[name] = _rate(float(qemu.follow(source)["total-time"]) / 1000)
    arguments = [*qemu.EMPTY, *memory, *qemu.backend_cold(SIZE_BYTES), "-incoming", "defer"]
    for name, prepare in _LOADS.items():
        with qemu.qemu(bench.directory, "qemu-load", arguments) as target:
            warm(SIZE_BYTES)
            prepare(stream)
            began = time.monotonic()
            target.execute("migrate-incoming", {"uri": f"exec:cat {stream}"})
            _wait_loaded(target)
            found[f"qemu {name}"] = _rate(time.monotonic() - began)
    stream.unlink()
    return found


def _wait_loaded(target: QmpClient) -> None:
    info: dict[str, Any] = {}
    deadline = time.monotonic() + DEADLINE_S
    while info.get("status") != "completed":
        if time.monotonic() > deadline:
            raise BenchError(f"QEMU has not loaded what it saved: {info}")
        info = target.execute("query-migrate")
        if info.get("status") == "failed":
            raise BenchError("QEMU does not load what it saved")
        time.sleep(POLL_S)
