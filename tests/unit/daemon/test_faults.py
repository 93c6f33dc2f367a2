"""Faults are for tests, and a daemon that was not started for one has none."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from migrated.daemon.faults import KEY_VARIABLE, Faults, FaultyStore, fault_point
from migrated.daemon.record import FileRecordStore
from migrated.errors import ConfigError
from migrated.migration.faultpoint import POINTS, no_fault

LOG = structlog.get_logger()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    faults = tmp_path / "faults"
    faults.mkdir()
    (faults / "key").write_text("open\n")
    return faults


def test_an_ordinary_daemon_has_none(tmp_path: Path) -> None:
    assert fault_point(tmp_path, LOG, {}) is no_fault


@pytest.mark.parametrize(
    ("key", "environment", "why"),
    [
        ("open", {}, "faults are asked for, and MIGRATED_FAULT_KEY is not set"),
        (None, {KEY_VARIABLE: "open"}, "cannot be read"),
        ("open", {KEY_VARIABLE: "shut"}, "not what"),
        ("", {KEY_VARIABLE: ""}, "not what"),
    ],
)
def test_half_a_wish_is_refused(key: str | None, environment: dict[str, str], why: str, tmp_path: Path) -> None:
    if key is not None:
        (tmp_path / "faults").mkdir()
        (tmp_path / "faults" / "key").write_text(key)
    with pytest.raises(ConfigError, match=f"for tests of migrated only|{why}") as refused:
        fault_point(tmp_path, LOG, environment)
    assert why in str(refused.value)


async def test_a_point_at_which_nothing_is_asked_for_is_passed(directory: Path) -> None:
    reach = fault_point(directory.parent, LOG, {KEY_VARIABLE: "open"})
    for point in POINTS:
        await reach(point)


async def test_a_record_that_cannot_be_written_is_the_one_before(directory: Path) -> None:
    faults = Faults(directory, LOG)
    store = FaultyStore(FileRecordStore(directory), faults.reach)
    await store.write({"hold": "owner"})
    (directory / "record.released").write_text("fail ENOSPC")
    with pytest.raises(OSError, match="asked for by a test") as refused:
        await store.write({"hold": "released"})
    assert refused.value.errno == errno.ENOSPC
    assert store.read() == {"hold": "owner"}
    await store.write({"hold": "released"})  # it takes effect once
    assert store.read() == {"hold": "released"}


async def test_it_waits_until_it_is_let_go(directory: Path) -> None:
    (directory / "source.sent").write_text("hold")
    waiting = asyncio.ensure_future(Faults(directory, LOG).reach("source.sent"))
    held = directory / "source.sent.held"
    while not held.exists():
        await asyncio.sleep(0)
    assert not waiting.done()
    held.unlink()
    await waiting


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_it_ends_or_stops_itself(action: str, number: signal.Signals, directory: Path) -> None:
    (directory / "source.sent").write_text(action)
    program = (
        "import asyncio, sys, pathlib, structlog; from migrated.daemon.faults import Faults\n"
        "asyncio.run(Faults(pathlib.Path(sys.argv[1]), structlog.get_logger()).reach('source.sent'))"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(directory)], stdout=subprocess.DEVNULL) as process:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        assert found is not None
        assert found.si_status == number
        process.send_signal(signal.SIGCONT)
        assert process.wait() == (0 if action == "stop" else -number)


async def test_what_does_not_exist_is_refused(directory: Path) -> None:
    faults = Faults(directory, LOG)
    with pytest.raises(ValueError, match="there is no fault point"):
        await faults.reach("source.nowhere")
    (directory / "source.sent").write_text("explode")
    with pytest.raises(ValueError, match="no such action"):
        await faults.reach("source.sent")
