"""A machine of many threads runs at the destination while its memory still arrives, and never sees a wrong page."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.integration.conftest import MIB, MakePager
from tests.integration.test_pager import assert_sound, start_pair
from tests.integration.test_workloads import workloads
from tests.support.following import assert_moved, assert_still_runs, run_state, wait_status, wait_until
from tests.support.pager import PagerSite

PAGE = 4096
#: 32 MiB take a while: time to look at a postcopy that is under way.
SLOW_BPS = 4 << 20
RAM_BYTES = 32 * MIB


def switch_on(*sites: Site, **capabilities: bool) -> None:
    wanted = {"postcopy-ram": True, **{name.replace("_", "-"): state for name, state in capabilities.items()}}
    on = [{"capability": name, "state": state} for name, state in wanted.items()]
    for site in sites:
        site.qmp.execute("migrate-set-capabilities", {"capabilities": on})


def speed(site: Site, bps: int) -> None:
    site.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": bps})


def leave(a: Site, b: Site) -> None:
    """Hand the machine over; return when it runs at ``b``, with most of its memory at ``a``."""
    speed(a, SLOW_BPS)
    a.qmp.execute("migrate", {"uri": b.address})
    a.qmp.execute("migrate-start-postcopy")
    wait_until(lambda: a.qmp.execute("x-migrated-query-ownership")["record"] == "moved", f"B runs it\n{a.log_tail()}")
    b.wait_event("running")


def follow(a: Site, b: Site) -> dict[str, Any]:
    """Let the rest of the memory come; return query-migrate's last answer."""
    speed(a, 0)
    figures = wait_status(a, {"completed"})
    wait_status(b, {"completed"})
    left = a.wait_event("moved")
    assert left["invariant"]
    assert run_state(a) == "postmigrate"
    return figures


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("preempt", [False, True])
def test_it_runs_while_its_memory_arrives(make_pager: MakePager, processes: int, preempt: bool) -> None:
    # A dozen threads at full speed would leave the daemons nothing of two processors.
    rate = 0 if processes == 1 else 20_000
    a, b = start_pair(
        make_pager, ram_bytes=RAM_BYTES, processes=processes, pattern="random", rate=rate, read_rate=20_000
    )
    switch_on(a, b, postcopy_preempt=preempt, postcopy_blocktime=True)
    for source, target in ((a, b), (b, a)):
        leave(source, target)
        figures = follow(source, target)
        assert figures["ram"]["postcopy-requests"] > 0
        assert figures["x-migrated-faults"]["remote"]["count"] > 0
        assert figures["ram"]["normal"] + figures["ram"]["duplicate"] >= RAM_BYTES // PAGE
        assert_sound(target)


def test_after_a_pass_only_what_was_written_since_comes_late(make_pager: MakePager) -> None:
    # Written faster than it is sent: whenever the switch comes, something is left for later.
    a, b = start_pair(make_pager, ram_bytes=RAM_BYTES, rate=20_000)
    switch_on(a, b)
    a.qmp.execute("migrate-set-parameters", {"downtime-limit": 0, "max-bandwidth": 32 * MIB})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: a.qmp.execute("query-migrate").get("x-migrated-passes"), "a pass")
    a.qmp.execute("migrate-start-postcopy")
    ram = wait_status(a, {"completed"})["ram"]
    assert_moved(a, b)
    assert_sound(b)
    phases = [ram[f"{phase}-bytes"] for phase in ("precopy", "downtime", "postcopy")]
    assert min(phases) > 0
    assert sum(phases) == ram["transferred"]


def test_a_machine_that_converges_needs_no_postcopy(make_pager: MakePager) -> None:
    a, b = start_pair(make_pager, rate=10)
    switch_on(a, b)
    a.qmp.execute("migrate", {"uri": b.address})
    figures = wait_status(a, {"completed"})
    assert "x-migrated-faults" not in figures
    assert_moved(a, b)
    assert_sound(b)


def test_devices_that_touch_missing_memory_while_they_are_loaded(make_pager: MakePager) -> None:
    a, b = start_pair(make_pager, ram_bytes=RAM_BYTES, device="counter", touch_on_load=50, rate=20_000)
    switch_on(a, b)
    a.qmp.execute("migrate", {"uri": b.address})
    a.qmp.execute("migrate-start-postcopy")
    figures = wait_status(a, {"completed"})
    assert figures["x-migrated-faults"]["requests"] >= 50
    b.wait_event("running")
    assert assert_sound(b)["device"]["loads"] == 1


def test_what_does_not_come_is_a_hole_and_not_zeros(make_pager: MakePager) -> None:
    """Blank memory needs no memory at the destination, and reads as zeros when somebody asks."""
    a, b = start_pair(make_pager, blank={"bss": 8 * MIB})
    switch_on(a, b)
    leave(a, b)
    follow(a, b)
    assert_sound(b)


@pytest.fixture
def far(make_pager: MakePager) -> tuple[PagerSite, PagerSite]:
    """The machine runs at the second, slowly, and most of its memory is at the first."""
    a, b = start_pair(make_pager, ram_bytes=RAM_BYTES, rate=200, read_rate=200)
    switch_on(a, b)
    leave(a, b)
    return a, b


LAST = RAM_BYTES // PAGE - 1


@pytest.mark.row(49)
def test_the_kernel_waits_for_pages_too(far: tuple[PagerSite, PagerSite]) -> None:
    a, b = far
    assert b.syscall_read(LAST)["bytes"] == 512
    follow(a, b)


@pytest.mark.row(49)
def test_a_forked_child_has_no_part_in_it(far: tuple[PagerSite, PagerSite]) -> None:
    a, b = far
    assert b.fork(LAST)["signal"] == signal.SIGSEGV
    follow(a, b)
    assert_sound(b)


def test_touches_are_served_one_by_one(far: tuple[PagerSite, PagerSite]) -> None:
    a, b = far
    assert len(b.touch(200)["us"]) == 200
    figures = follow(a, b)
    assert figures["x-migrated-faults"]["remote"]["count"] >= 100
    assert_sound(b)


def test_an_operator_stops_and_continues_it_meanwhile(far: tuple[PagerSite, PagerSite]) -> None:
    a, b = far
    b.qmp.execute("stop")
    assert run_state(b) == "paused"
    assert b.qmp.execute("x-migrated-query-ownership")["record"] == "incomplete"
    with pytest.raises(CommandError, match="Migration is not finalized yet"):
        b.qmp.execute("cont")
    follow(a, b)
    assert run_state(b) == "paused"
    b.qmp.execute("cont")
    assert_sound(b)


def test_a_machine_that_was_stopped_arrives_stopped(make_pager: MakePager) -> None:
    a, b = start_pair(make_pager, ram_bytes=RAM_BYTES)
    switch_on(a, b)
    a.qmp.execute("stop")
    speed(a, SLOW_BPS)
    a.qmp.execute("migrate", {"uri": b.address})
    a.qmp.execute("migrate-start-postcopy")
    wait_until(lambda: a.qmp.execute("x-migrated-query-ownership")["record"] == "moved", "B has it")
    follow(a, b)
    assert run_state(b) == "paused"
    b.qmp.execute("cont")
    b.wait_event("running")
    assert_sound(b)


def memory(site: PagerSite) -> int:
    """Return a descriptor of the heap of a site's pager, opened through /proc; the caller closes it."""
    for fd in Path(f"/proc/{site.walker.pid}/fd").iterdir():
        if "memfd:" in (link := os.readlink(fd)) and "heap" in link:
            return os.open(fd, os.O_RDONLY | os.O_CLOEXEC)
    raise AssertionError("no heap")


def pages_with_data(fd: int) -> list[int]:
    """Return the pages that are no holes. Asking does not fill any, as a look through a mapping would."""
    pages: list[int] = []
    at = 0
    while True:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return pages
        end = os.lseek(fd, at, os.SEEK_HOLE)
        pages.extend(range(at // PAGE, end // PAGE))
        at = end


@pytest.mark.row(11, 30)
def test_a_destination_daemon_that_dies_leaves_the_workload_waiting_and_not_with_zeros(
    far: tuple[PagerSite, PagerSite],
) -> None:
    a, b = far
    fd = memory(b)
    try:
        for _ in range(2):
            b.restart_daemon()
            assert b.qmp.execute("x-migrated-query-ownership")["record"] == "incomplete"
            with pytest.raises(CommandError, match="a part of its memory is still at"):
                b.qmp.execute("cont")
            with pytest.raises(CommandError):
                b.qmp.execute("migrate", {"uri": a.address})
            assert not workloads(b)
            there = pages_with_data(fd)
            assert len(there) < RAM_BYTES // PAGE
            assert [page for page in there if not any(os.pread(fd, PAGE, page * PAGE))] == []
    finally:
        os.close(fd)
    assert b.walker.poll() is None
    wait_until(lambda: a.qmp.execute("query-migrate")["status"] == "postcopy-paused", "A waits")
    b.stop_walker()
    b.qmp.execute("x-migrated-release")
    assert b.qmp.execute("x-migrated-query-ownership")["record"] == "none"


def test_a_workload_that_dies_at_the_destination_ends_it(far: tuple[PagerSite, PagerSite]) -> None:
    a, b = far
    b.stop_walker()
    speed(a, 0)
    figures = wait_status(a, {"failed"})
    assert "workload walker-B" in figures["error-desc"]
    assert figures["x-migrated-outcome"] == "destination-owns"
    assert run_state(a) == "finish-migrate"


def test_postcopy_is_refused_where_there_is_no_way_back(make_pager: MakePager, tmp_path: Path) -> None:
    a = make_pager("A")
    a.run()
    switch_on(a)
    a.qmp.execute("migrate", {"uri": f"file:{tmp_path}/machine"})
    figures = wait_status(a, {"failed"})
    assert "postcopy needs a connection with a return path" in figures["error-desc"]
    assert_still_runs(a)
