"""Blocks in huge pages of 2 MiB, on the real kernel: they move, and are in huge pages at the other end, too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrated.demo.site import Site
from tests.integration.conftest import MIB, MakeSite
from tests.integration.test_postcopy import leave, speed, switch_on
from tests.integration.test_snapshots import started
from tests.support.following import assert_moved, assert_still_runs, migrate, run_state, wait_status, wait_until
from tests.support.huge_pages import huge_bytes_of, huge_pages
from tests.support.jobs import run_job

RAM_BYTES = 16 * MIB
HUGE = ["--huge-pages"]


@pytest.fixture
def reserved() -> Iterator[None]:
    with huge_pages(2 * RAM_BYTES // (2 * MIB)):
        yield


@pytest.fixture
def pair(reserved: None, make_site: MakeSite) -> tuple[Site, Site]:
    a, b = (make_site(name, ram_bytes=RAM_BYTES, walker_arguments=HUGE) for name in "AB")
    return started(a), b


def assert_huge(*sites: Site) -> None:
    for site in sites:
        assert huge_bytes_of(site.walker.pid) == RAM_BYTES
        (block,) = site.qmp.execute("x-migrated-query-machine")["blocks"]
        assert block["page-size"] == 2 * MIB


@pytest.mark.parametrize("channels", [0, 2])
def test_precopy_there_and_back_under_load(pair: tuple[Site, Site], channels: int) -> None:
    a, b = pair
    for site in pair:
        site.qmp.execute("migrate-set-parameters", {"multifd-channels": max(channels, 1)})
        switch_on(site, multifd=channels > 0, postcopy_ram=False)
    for source, target in ((a, b), (b, a)):
        figures = migrate(source, target)
        assert figures["ram"]["dirty-sync-count"] >= 2
        assert_huge(a, b)
    assert_still_runs(a)


@pytest.mark.parametrize("preempt", [False, True])
def test_postcopy_there_and_back(pair: tuple[Site, Site], preempt: bool) -> None:
    a, b = pair
    switch_on(a, b, postcopy_preempt=preempt)
    for source, target in ((a, b), (b, a)):
        source.qmp.execute("migrate", {"uri": target.address})
        source.qmp.execute("migrate-start-postcopy")
        figures = wait_status(source, {"completed"})
        assert_moved(source, target)
        assert figures["ram"]["postcopy-requests"] > 0
        assert_huge(a, b)


def test_postcopy_after_passes_of_precopy(pair: tuple[Site, Site]) -> None:
    """What was sent in part of a huge page since it was written is dropped with all of it."""
    a, b = pair
    switch_on(a, b)
    a.qmp.execute("migrate-set-parameters", {"downtime-limit": 0, "max-bandwidth": 64 * MIB})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: a.qmp.execute("query-migrate").get("x-migrated-passes"), "a pass")
    a.qmp.execute("migrate-start-postcopy")
    wait_status(a, {"completed"})
    assert_moved(a, b)
    assert_huge(a, b)


def test_a_pause_in_postcopy_and_a_recovery(pair: tuple[Site, Site]) -> None:
    a, b = pair
    switch_on(a, b)
    leave(a, b)
    a.qmp.execute("migrate-pause")
    wait_status(a, {"postcopy-paused"})
    wait_status(b, {"postcopy-paused"})
    speed(a, 0)
    a.qmp.execute("migrate", {"uri": b.address, "resume": True})
    wait_status(a, {"completed"})
    wait_status(b, {"completed"})
    assert a.wait_event("moved")["invariant"]
    assert b.check()["invariant"]
    assert_huge(a, b)


def test_a_daemon_that_was_restarted(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.restart_daemon()
    # Its device is the last that it declares.
    wait_until(lambda: a.qmp.execute("x-migrated-query-machine")["devices"], "the walker is back")
    migrate(a, b)
    assert_huge(a, b)


def test_snapshots(pair: tuple[Site, Site]) -> None:
    a, _ = pair
    run_job(a.qmp, "snapshot-save", "one")
    assert_still_runs(a)
    run_job(a.qmp, "snapshot-load", "one")
    assert_still_runs(a)
    assert_huge(a)


@pytest.mark.parametrize("postcopy", [False, True])
def test_other_pages_at_the_destination_are_refused_before_anything_moves(
    reserved: None, make_site: MakeSite, postcopy: bool
) -> None:
    a = started(make_site("A", ram_bytes=RAM_BYTES, walker_arguments=HUGE))
    b = make_site("B", ram_bytes=RAM_BYTES)
    switch_on(a, b, postcopy_ram=postcopy)
    a.qmp.execute("migrate", {"uri": b.address})
    error = wait_status(a, {"failed"})["error-desc"]
    assert f"RAM block heap has pages of {2 * MIB} bytes, and here of 4096" in error
    assert_still_runs(a)
    assert run_state(b) == "inmigrate"
