"""`migratectl` and postcopy between two real daemons: the switch, a pause, a recovery, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from migrated.demo.site import Site
from tests.support.following import assert_moved, run_state, wait_status, wait_until

#: Slow enough that a test can do something in the middle.
SLOW_BPS = 512 << 10
DEADLINE_S = 50


class Program:
    """A `migratectl` that runs beside the test; what it says is kept."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def said(self, text: str) -> None:
        """Wait until it says so."""
        wait_until(lambda: text in "".join(self.lines), f"{text!r} in {self.lines}")

    def end(self) -> int:
        """Wait for its end."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join()
        return code


@contextmanager
def started(site: Site, *words: str) -> Iterator[Program]:
    socket = str(site.directory / "run" / "qmp.sock")
    command = [sys.executable, "-u", "-m", "migrated.cli.app", "--socket", socket, *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        program = Program(process)
        try:
            yield program
        finally:
            process.kill()
            program.end()


def migratectl(site: Site, *words: str, code: int = 0) -> str:
    with started(site, *words) as program:
        assert program.end() == code, program.lines
        return "".join(program.lines)


def slow(site: Site, bps: int = SLOW_BPS) -> None:
    site.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": bps})


def postcopy_is_on(site: Site) -> bool:
    rows = site.qmp.execute("query-migrate-capabilities")
    return bool(next(row["state"] for row in rows if row["capability"] == "postcopy-ram"))


@pytest.mark.parametrize("moment", ["=at-once", "=after-pass:1", "=when-stuck"])
def test_a_migration_that_switches(moment: str, pair: tuple[Site, Site]) -> None:
    a, b = pair
    # Too narrow for the walker, so that precopy alone never ends.
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 24 << 20, "downtime-limit": 20})
    report = json.loads(migratectl(a, "migrate", b.address, f"--postcopy{moment}", "--json").splitlines()[-1])
    assert report["outcome"] == "destination-owns"
    assert report["faults"]["requests"] > 0
    assert len(report["passes"]) >= (moment != "=at-once")
    assert not postcopy_is_on(a)
    assert_moved(a, b)
    assert "waited for the source" in migratectl(b, "status")


def test_without_a_moment_an_operator_switches(pair: tuple[Site, Site]) -> None:
    a, b = pair
    migratectl(a, "start-postcopy", code=3)
    migratectl(a, "capabilities", "postcopy-ram=on")
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 4 << 20, "downtime-limit": 20})
    with started(a, "migrate", b.address) as program:
        program.said("active")
        migratectl(a, "start-postcopy")
        assert program.end() == 0, program.lines
    assert_moved(a, b)
    assert postcopy_is_on(a)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_pause_by_hand_is_recovered_by_hand(elsewhere: bool, pair: tuple[Site, Site]) -> None:
    a, b = pair
    slow(a)
    with ExitStack() as stack:
        program = stack.enter_context(started(a, "migrate", b.address, "--postcopy=at-once"))
        program.said("no way back")
        assert "keep this host up" in migratectl(a, "status")
        assert "memory still comes from" in migratectl(b, "status")
        migratectl(a, "pause")
        program.said("Paused: ")
        wait_status(b, {"postcopy-paused"})
        assert "`migratectl recover`" in migratectl(b, "status")
        slow(a, 0)
        words = ["recover"]
        if elsewhere:
            said = migratectl(b, "recover", "tcp:127.0.0.1:0")
            words.append(said.split("`migratectl recover ", 1)[1].split("`")[0])
            assert words[-1].startswith("tcp:127.0.0.1:")
        else:
            assert b.address in migratectl(b, "recover")
        assert "Migration completed" in migratectl(a, *words)
        assert program.end() == 0, program.lines
    assert_moved(a, b)


def test_ctrl_c_leaves_a_postcopy_alone(pair: tuple[Site, Site]) -> None:
    a, b = pair
    slow(a)
    with started(a, "migrate", b.address, "--postcopy=at-once") as program:
        program.said("no way back")
        migratectl(a, "cancel", code=3)
        program.process.send_signal(signal.SIGINT)
        assert program.end() == 130
        assert "cannot be cancelled" in program.lines[-1]
    assert a.qmp.execute("query-migrate")["status"] == "postcopy-active"
    slow(a, 0)
    wait_status(a, {"completed"})
    assert_moved(a, b)


def test_a_source_that_is_lost_leaves_the_machine_standing_and_never_zeros(pair: tuple[Site, Site]) -> None:
    a, b = pair
    slow(a)
    with started(a, "migrate", b.address, "--postcopy=at-once") as program:
        program.said("no way back")
        b.wait_event("running")
        a.daemon.kill()
        a.daemon.wait()
        assert program.end() == 6, program.lines
    wait_status(b, {"postcopy-paused"})
    assert run_state(b) == "running"
    assert "incomplete" in migratectl(b, "status")
    a.stop_walker()
