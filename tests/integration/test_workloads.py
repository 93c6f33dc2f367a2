"""Workloads that do not do what they should are named; the machine at the source goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from migrated.demo.site import Site
from tests.integration.conftest import MakeSite
from tests.support.following import assert_moved, assert_still_runs, migrate, run_state, wait_status, wait_until


def start(make_site: MakeSite, name: str, mode: str) -> Site:
    site = make_site(name, module="tests.support.misbehave", walker_arguments=["--mode", mode])
    if name == "A":
        site.qmp.execute("cont")
        site.wait_event("running")
    return site


def fail(source: Site, target: Site) -> str:
    """Migrate, expect failure with the source in charge, and return the reason."""
    source.qmp.execute("migrate", {"uri": target.address})
    figures = wait_status(source, {"failed"})
    assert figures["x-migrated-outcome"] == "source-owns"
    return str(figures["error-desc"])


@pytest.mark.row(50)
def test_a_workload_that_hangs_in_on_stop_is_named_and_goes_on(make_site: MakeSite) -> None:
    a, b = start(make_site, "A", "hang-stop"), start(make_site, "B", "none")
    a.qmp.execute("migrate-set-parameters", {"x-migrated-stop-timeout": 500})
    assert "workload walker-A: " in (reason := fail(a, b)), reason
    assert run_state(a) == "running"


def test_a_slow_stop_within_the_deadline_is_fine(make_site: MakeSite) -> None:
    a, b = start(make_site, "A", "slow-stop"), start(make_site, "B", "slow-stop")
    assert migrate(a, b)["x-migrated-downtime"]["stop"] >= 300


def test_a_writer_that_did_not_stop_is_caught_and_named(make_site: MakeSite) -> None:
    a, b = start(make_site, "A", "stray"), start(make_site, "B", "stray")
    reason = fail(a, b)
    assert "workload walker-A: it wrote to block scratch after it said it had stopped" in reason
    assert_still_runs(a)


def test_a_workload_that_dies_while_saving_is_named(make_site: MakeSite) -> None:
    a, b = start(make_site, "A", "die-on-save"), start(make_site, "B", "die-on-save")
    a.qmp.execute("migrate", {"uri": b.address})
    assert "walker-A" in wait_status(a, {"failed"})["error-desc"]
    wait_until(lambda: b.qmp.execute("query-migrate")["status"] == "failed", "B noticed")
    assert run_state(b) == "inmigrate"


@pytest.mark.row(25, 50)
def test_a_device_that_cannot_be_restored_resumes_the_source(make_site: MakeSite) -> None:
    a, b = start(make_site, "A", "fail-on-load"), start(make_site, "B", "fail-on-load")
    reason = fail(a, b)
    assert "picky" in reason
    assert "cannot restore b'state'" in reason
    assert_still_runs(a)


def test_a_device_without_a_twin_is_named_by_the_destination(make_site: MakeSite) -> None:
    a = start(make_site, "A", "fail-on-load")
    b = make_site("B", config="[workload]\nattach-timeout = 1\n")
    assert "nothing here takes picky/0" in fail(a, b)
    assert_still_runs(a)


def test_a_twin_with_a_device_that_does_not_arrive_is_refused(make_site: MakeSite) -> None:
    a, b = start(make_site, "A", "none"), start(make_site, "B", "fail-on-load")
    assert "nothing comes for picky/0 [section-not-sent]" in fail(a, b)
    assert_still_runs(a)


@pytest.mark.row(12)
def test_a_workload_killed_in_the_middle_is_named(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"active"})
    a.walker.kill()
    assert "workload walker-A" in wait_status(a, {"failed"})["error-desc"]
    wait_until(lambda: b.qmp.execute("query-migrate")["status"] == "failed", "B noticed")


def memory_of(site: Site) -> bytes:
    """Read the daemon's only RAM block."""
    for fd in Path(f"/proc/{site.daemon.pid}/fd").iterdir():
        if "memfd:" in os.readlink(fd) and "heap" in os.readlink(fd):
            return fd.read_bytes()
    raise AssertionError("no block")


def test_a_signal_workload_is_stopped_by_signal_and_moves(make_site: MakeSite) -> None:
    a, b = start(make_site, "A", "signal"), start(make_site, "B", "signal")
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"completed"})
    arrived = b.wait_event("running")
    assert arrived["hash"] == xxh3_128_hexdigest(memory_of(a))
    assert all(state == "T" for state in task_states(a.walker.pid))
    assert run_state(b) == "running"


def task_states(pid: int) -> list[str]:
    stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


@pytest.mark.parametrize("when", ["idle", "after a migration"])
def test_a_daemon_that_restarts_takes_its_workload_back(pair: tuple[Site, Site], when: str) -> None:
    a, b = pair
    here, there = a, b
    if when != "idle":
        migrate(a, b)
        here, there = b, a
    here.restart_daemon()
    wait_until(lambda: workloads(here), "the walker re-attached")
    assert_still_runs(here)
    migrate(here, there)


def workloads(site: Site) -> list[Any]:
    return list(site.qmp.execute("x-migrated-query-machine")["workloads"])


@pytest.mark.row(2)
def test_a_source_daemon_killed_in_the_middle_leaves_the_workload_running(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"active"})
    a.restart_daemon()
    wait_until(lambda: workloads(a), "the walker re-attached")
    assert_still_runs(a)
    wait_until(lambda: b.qmp.execute("query-migrate")["status"] == "failed", "B noticed")
    migrate(a, b)


def test_the_twin_may_attach_late(make_site: MakeSite, tmp_path: Path) -> None:
    a, b = start(make_site, "A", "none"), make_site("B")
    b.stop_walker()
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: b.qmp.execute("query-migrate").get("status") == "active", "B waits for its workload")
    b.start_walker()
    wait_status(a, {"completed"})
    assert_moved(a, b)
