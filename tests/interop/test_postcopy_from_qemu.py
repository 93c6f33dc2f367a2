"""A real QEMU 7.2 is the source of a postcopy: its machine runs here first, and has all its memory in the end.

A QEMU 7.2 counts requested pages against max-postcopy-bandwidth, one each 100 ms if it is as low as here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.interop.conftest import SIZE, content
from tests.support.following import DEADLINE_S, wait_until
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.proxy import Proxy
from tests.support.qemu import BLOCK, PAGE, MakeQemu, Qemu

#: Precopy would take minutes with this, so that it never ends by itself.
SLOW_BPS = 64 << 10
TRICKLE_BPS = 16 << 10
#: What is answered to RECV_BITMAP: a head, a name, one bit for each page and an end mark.
BITMAP_BYTES = 4 + 1 + len(BLOCK) + 8 + SIZE // PAGE // 8 + 8
#: What is read here while it is missing: the last pages, which come last in the background.
TAIL = 8 * PAGE


@pytest.fixture
def source(make_qemu: MakeQemu) -> Qemu:
    source = make_qemu("source", ram=content(1))
    for name in ("return-path", "postcopy-ram"):
        source.capability(name)
    source.parameter("downtime-limit", 1)
    source.parameter("max-bandwidth", SLOW_BPS)
    source.parameter("max-postcopy-bandwidth", TRICKLE_BPS)
    return source


@pytest.fixture
def site(make_site: MakeSite) -> HoldingSite:
    site = make_site("site")
    site.capability("postcopy-ram")
    return site


def go(source: Qemu, site: HoldingSite, uri: str) -> None:
    """Hand the machine over by postcopy, at once."""
    source.qmp.execute("migrate", {"uri": uri})
    source.wait_status({"active"})
    source.qmp.execute("migrate-start-postcopy")
    source.wait_status({"postcopy-active"})
    site.wait_event("running")


def begin_read(site: HoldingSite, at: int) -> None:
    """Have the holder read memory that is missing."""
    site.begin("peek", block=BLOCK, offset=at, length=TAIL)


def end_read(site: HoldingSite) -> bytes:
    return bytes.fromhex(site.wait_event("did")["hex"])


def pauses(site: HoldingSite) -> int:
    """Return how often a migration has been paused here."""
    return site.log_path.read_text().count('"migration_paused"')


def assert_moved(source: Qemu, site: HoldingSite, memory: bytes) -> dict[str, Any]:
    """Let everything come, and hold the oracle against it; return our figures."""
    source.parameter("max-postcopy-bandwidth", 0)
    ours = site.wait_status("completed")
    source.wait_status({"completed"})
    assert site.peek(BLOCK) == source.ram() == memory
    assert (source.run_state(), site.run_state()) == ("postmigrate", "running")
    assert site.qmp.execute("x-migrated-query-ownership")["record"] == "owner"
    return ours


def test_at_once(source: Qemu, site: HoldingSite) -> None:
    source.events()
    go(source, site, site.address)
    assert site.qmp.execute("x-migrated-query-ownership")["record"] == "incomplete"
    assert_moved(source, site, content(1))
    seen = [event["data"]["status"] for event in source.events() if event["event"] == "MIGRATION"]
    assert seen == ["setup", "active", "postcopy-active", "completed"]
    assert not source.said()


def test_after_some_pages(source: Qemu, site: HoldingSite) -> None:
    source.parameter("max-bandwidth", SIZE)
    source.qmp.execute("migrate", {"uri": site.address})
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > SIZE // 4, "pages were sent")
    source.parameter("max-bandwidth", SLOW_BPS)
    source.qmp.execute("migrate-start-postcopy")
    source.wait_status({"postcopy-active"})
    assert_moved(source, site, content(1))


def test_what_is_waited_for_comes_first(source: Qemu, site: HoldingSite) -> None:
    go(source, site, site.address)
    begin_read(site, SIZE - TAIL)
    assert end_read(site) == content(1)[-TAIL:]
    ram = source.query()["ram"]
    assert ram["postcopy-requests"] >= 1
    assert ram["remaining"] > 0, "it came before its turn"
    ours = assert_moved(source, site, content(1))
    assert ours["x-migrated-faults"]["requests"] >= 1


@pytest.fixture
def link(site: HoldingSite) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", site.port)) as link:
        yield link


def test_cuts_and_recoveries(source: Qemu, site: HoldingSite, link: Proxy) -> None:
    """Twice in a row, each time with a request that got lost."""
    go(source, site, link.uri)
    for cut in range(2):
        link.backward.hit.clear()
        link.backward.limit, link.backward.at_limit = link.backward.passed, "swallow"
        at = SIZE - (cut + 1) * TAIL
        begin_read(site, at)
        assert link.backward.hit.wait(DEADLINE_S), "a page is asked for"
        link.cut()
        source.wait_status({"postcopy-paused"})
        assert site.wait_status("postcopy-paused")["error-desc"]
        assert site.run_state() == "running"
        link.backward.limit = None
        source.qmp.execute("migrate", {"uri": link.uri, "resume": True})
        assert end_read(site) == content(1)[at : at + TAIL]
        assert source.query()["ram"]["remaining"] > 0
    assert_moved(source, site, content(1))


def test_a_pause_by_the_operator_and_another_address(source: Qemu, site: HoldingSite) -> None:
    go(source, site, site.address)
    source.qmp.execute("migrate-pause")
    source.wait_status({"postcopy-paused"})
    site.wait_status("postcopy-paused")
    site.qmp.execute("migrate-recover", {"uri": "tcp:127.0.0.1:0"})
    source.qmp.execute("migrate", {"uri": site.address, "resume": True})
    source.wait_status({"postcopy-active", "completed"})
    assert_moved(source, site, content(1))


def test_requested_pages_come_over_a_connection_of_their_own(source: Qemu, site: HoldingSite) -> None:
    """Capability postcopy-preempt, also after a pause."""
    source.capability("postcopy-preempt")
    site.capability("postcopy-preempt")
    go(source, site, site.address)
    for attempt in range(2):
        at = SIZE - (attempt + 1) * TAIL
        begin_read(site, at)
        assert end_read(site) == content(1)[at : at + TAIL]
        if not attempt:
            source.qmp.execute("migrate-pause")
            source.wait_status({"postcopy-paused"})
            site.wait_status("postcopy-paused")
            source.qmp.execute("migrate", {"uri": site.address, "resume": True})
            source.wait_status({"postcopy-active"})
    assert_moved(source, site, content(1))


def test_a_cut_during_the_recovery_is_another_pause(source: Qemu, site: HoldingSite, link: Proxy) -> None:
    """At this end; a QEMU 7.2 stays in postcopy-recover for good and takes no further order."""
    go(source, site, link.uri)
    source.qmp.execute("migrate-pause")
    source.wait_status({"postcopy-paused"})
    site.wait_status("postcopy-paused")
    link.backward.hit.clear()
    link.backward.limit, link.backward.at_limit = link.backward.passed + BITMAP_BYTES // 2, "cut"
    source.qmp.execute("migrate", {"uri": link.uri, "resume": True})
    assert link.backward.hit.wait(DEADLINE_S), "half a bitmap has passed"
    wait_until(lambda: pauses(site) == 2, "it is paused here once more")
    assert site.wait_status("postcopy-paused")["error-desc"]
    assert site.run_state() == "running"
    assert site.qmp.execute("x-migrated-query-ownership")["record"] == "incomplete"
