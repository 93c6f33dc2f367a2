"""The multi-threaded workload in C is a workload like any other, and its oracle sees what it has to see.

The rule of the file: precopy only. What postcopy does with it stands on what is proven here.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import MIB, MakePager
from tests.integration.test_workloads import memory_of, workloads
from tests.support.following import assert_still_runs, migrate, run_state, wait_status, wait_until
from tests.support.pager import PagerSite

#: 16 MiB take seconds: time to look at a migration that is under way.
SLOW_BPS = 4 << 20
#: Every page is dirty at any time: it never fits a short downtime where the daemons get little of the processors.
PATIENT_MS = 10_000


def start_pair(make_pager: MakePager, **options: Any) -> tuple[PagerSite, PagerSite]:
    """Two sites; the machine runs at the first."""
    a, b = make_pager("A", **options), make_pager("B", twin=True, **options)
    for site in (a, b):
        site.qmp.execute("migrate-set-parameters", {"downtime-limit": PATIENT_MS})
    a.run()
    return a, b


def assert_sound(site: PagerSite) -> dict[str, Any]:
    """Every thread does something, and none of them ever saw a wrong page."""
    first = site.check()
    wait_until(lambda: all(now > then for now, then in zip(site.check()["walkers"], first["walkers"], strict=True)),
               "all walkers walk")  # fmt: skip
    wait_until(lambda: site.check()["reads"] > first["reads"], "readers read")
    found = site.check()
    assert found["violations"] == 0
    assert found["invariant"]
    return found


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("pattern", ["linear", "random"])
def test_it_moves_there_and_back_under_full_load(make_pager: MakePager, processes: int, pattern: str) -> None:
    pair = a, b = start_pair(make_pager, processes=processes, pattern=pattern)
    assert a.ready["tracked"]
    assert len(workloads(a)) == processes
    for source, target in ((a, b), (b, a), (a, b)):
        migrate(source, target)
    for site in pair:
        assert len(workloads(site)) == processes
    found = assert_sound(b)
    assert len(found["walkers"]) == 4 * processes


def test_several_blocks_and_a_device_travel_together(make_pager: MakePager) -> None:
    a, b = start_pair(
        make_pager, blocks={"extra": 4 * MIB}, blank={"bss": 4 * MIB}, device="counter", touch_on_load=100, processes=2
    )
    figures = migrate(a, b)
    assert figures["ram"]["duplicate"] >= 4 * MIB // 4096  # the blank pages
    migrate(b, a)
    found = assert_sound(a)
    assert list(found["blocks"]) == ["heap", "extra", "bss"]
    assert found["device"] == {"saves": 2, "loads": 1}


@pytest.mark.parametrize("processes", [1, 2])
def test_the_kernel_tracks_what_it_writes(make_pager: MakePager, processes: int) -> None:
    a, b = start_pair(make_pager, processes=processes, rate=2000)
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": SLOW_BPS})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: a.qmp.execute("query-migrate").get("ram", {}).get("normal"), "pages leave")
    assert [tracked(pid) for pid in a.ready["pids"]] == [True] * processes
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    wait_until(lambda: b.qmp.execute("query-migrate")["status"] == "failed", "B noticed")
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    # Only what was written in the meantime is sent again.
    pages = migrate(a, b)["ram"]
    assert 4096 <= pages["normal"] + pages["duplicate"] < 2 * 4096
    assert_sound(b)


def tracked(pid: int) -> bool:
    """Say whether the kernel notes the writes of a process to its block (userfaultfd, write protection)."""
    maps = Path(f"/proc/{pid}/smaps").read_text()
    found = re.search(r"memfd:heap.*?^VmFlags: ([^\n]*)", maps, re.DOTALL | re.MULTILINE)
    assert found is not None
    return "uw" in found[1].split()


def differs(site: PagerSite, before: bytes) -> bool:
    return memory_of(site) != before


@pytest.mark.parametrize("processes", [1, 2])
def test_stop_and_cont_are_answered(make_pager: MakePager, processes: int) -> None:
    a = make_pager("A", processes=processes)
    a.run()
    for _ in range(5):
        a.qmp.execute("stop")
        assert run_state(a) == "paused"
        before = memory_of(a)
        assert memory_of(a) == before
        a.qmp.execute("cont")
        wait_until(partial(differs, a, before), "it walks on")
    assert_sound(a)


def test_it_slows_down_when_it_is_told_to(make_pager: MakePager) -> None:
    a, b = start_pair(make_pager, processes=2)
    # Never converges by itself: the walkers write faster than anything sends.
    a.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": "auto-converge", "state": True}]})
    a.qmp.execute(
        "migrate-set-parameters", {"max-bandwidth": 16 * MIB, "cpu-throttle-initial": 90, "downtime-limit": 1}
    )
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: a.qmp.execute("query-migrate").get("cpu-throttle-percentage"), "it is throttled")
    assert_still_runs(a)
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    assert_sound(a)


@pytest.mark.parametrize("processes", [1, 2])
def test_it_comes_back_to_a_daemon_that_restarts(make_pager: MakePager, processes: int) -> None:
    a, b = start_pair(make_pager, processes=processes, device="counter", rate=5000, read_rate=1000)
    a.restart_daemon()
    wait_until(lambda: len(workloads(a)) == processes, "all re-attached")
    assert_still_runs(a)
    migrate(a, b)
    b.restart_daemon()
    wait_until(lambda: len(workloads(b)) == processes, "all re-attached")
    assert_sound(b)
    a.restart_daemon()
    wait_until(lambda: len(workloads(a)) == processes, "all re-attached")
    migrate(b, a)


def test_one_that_was_stopped_stays_stopped(make_pager: MakePager) -> None:
    a = make_pager("A", processes=2, rate=5000, read_rate=1000)
    a.run()
    a.qmp.execute("stop")
    before = memory_of(a)
    a.restart_daemon()
    wait_until(lambda: len(workloads(a)) == 2, "all re-attached")
    assert run_state(a) == "paused"
    assert memory_of(a) == before
    a.qmp.execute("cont")
    assert_sound(a)


def test_what_is_asked_of_its_pages_is_answered(make_pager: MakePager) -> None:
    a = make_pager("A")
    a.run()
    assert a.syscall_read(7)["bytes"] == 512
    assert a.punch(8)["zero"]
    assert a.fork(9)["signal"] == 11  # its memory is not inherited
    assert len(a.touch(100)["us"]) == 100
    assert_sound(a)


@pytest.mark.parametrize(("harm", "kind"), [("lose", "zero"), ("age", "stale")])
def test_the_oracle_is_not_blind(make_pager: MakePager, harm: str, kind: str) -> None:
    a = make_pager("A", rate=1000)
    a.run()
    wait_until(lambda: min(a.check()["walkers"]) > 0, "all walkers walk")
    page = 0  # of walker 0, who has been there
    getattr(a, harm)(page)
    violation = a.wait_event("violation")
    assert (violation["kind"], violation["page"]) == (kind, page)
    found = a.check()
    assert not found["invariant"]
    assert found["violations"] >= 1


def test_a_twin_in_which_nothing_arrived_says_so(make_pager: MakePager) -> None:
    b = make_pager("B", twin=True, rate=1000)
    b.qmp.execute("cont")
    assert b.wait_event("violation")["kind"] == "zero"
