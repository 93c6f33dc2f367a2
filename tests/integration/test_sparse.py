"""Memory that nobody has written takes no memory, at either end, whichever way a machine goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.house.repository import ROOT
from tests.integration.conftest import MIB
from tests.support.following import wait_until
from tests.support.holding_site import HoldingSite
from tests.support.huge_pages import huge_pages
from tests.support.jobs import run_job

PAGE = 4096
SIZE = 64 * MIB
HUGE = 2 * MIB
#: Pages that are written: alone, side by side, at both ends, and enough of them to be more than a round trip.
WRITTEN = [0, 7, *range(100, 140), *range(1000, 5000, 10), SIZE // PAGE - 1]
WITHOUT_USERFAULTFD = ROOT / "tests" / "support" / "without_userfaultfd.py"
SLOW_BPS = 256 << 10

Make = Callable[..., HoldingSite]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:

        def make(name: str, **options: object) -> HoldingSite:
            return stack.enter_context(HoldingSite(name, tmp_path, blocks={"heap": SIZE}, **options))  # type: ignore[arg-type]

        yield make


def used(site: HoldingSite) -> int:
    """Return how much memory a site's block takes."""
    for fd in Path(f"/proc/{site.holder.pid}/fd").iterdir():
        if "memfd:heap" in os.readlink(fd):
            return os.stat(fd).st_blocks * 512
    raise AssertionError("no heap")


def filled(site: HoldingSite) -> HoldingSite:
    """Have some pages written, one by one."""
    site.qmp.execute("cont")
    site.wait_event("running")
    for page in WRITTEN:
        site.begin("poke", block="heap", offset=page * PAGE, hex="aa")
    for _ in WRITTEN:
        site.wait_event("did")
    return site


def pages_of(site: HoldingSite) -> list[int]:
    """Return which pages have their byte, without looking at others."""
    for page in WRITTEN:
        site.begin("peek", block="heap", offset=page * PAGE, length=2)
    return [page for page in WRITTEN if site.wait_event("did")["hex"] == "aa00"]


def go(source: HoldingSite, target: HoldingSite, **capabilities: bool) -> None:
    for site in (source, target):
        for name, state in capabilities.items():
            site.capability(name.replace("_", "-"), state=state)
    source.migrate(target.address)
    target.wait_status("completed")
    target.wait_event("running")


def assert_sparse(*sites: HoldingSite, size: int = len(WRITTEN) * PAGE) -> None:
    assert [used(site) for site in sites] == [size] * len(sites)
    assert pages_of(sites[-1]) == WRITTEN
    assert [used(site) for site in sites] == [size] * len(sites)


@pytest.mark.parametrize("way", [{}, {"multifd": True}, {"xbzrle": True}], ids=["one connection", "multifd", "xbzrle"])
def test_precopy_there_and_back(make: Make, way: dict[str, bool]) -> None:
    a, b = filled(make("A")), make("B")
    go(a, b, **way)
    assert_sparse(a, b)
    go(b, a, **way)
    assert_sparse(b, a)


@pytest.mark.parametrize("multifd", [False, True])
def test_what_became_zero_elsewhere_is_a_hole_at_home(make: Make, multifd: bool) -> None:
    """Memory that is there when a machine comes back is overwritten, and given back where it came to be zero."""
    a, b = filled(make("A")), make("B")
    go(a, b, multifd=multifd)
    zeroed = WRITTEN[5:60]
    for page in zeroed:
        b.begin("poke", block="heap", offset=page * PAGE, hex="00")
    for _ in zeroed:
        b.wait_event("did")
    b.poke("heap", 9000 * PAGE, b"new")
    go(b, a, multifd=multifd)
    assert used(a) == (len(WRITTEN) - len(zeroed) + 1) * PAGE
    assert pages_of(a) == [page for page in WRITTEN if page not in zeroed]
    assert a.do("peek", block="heap", offset=9000 * PAGE, length=4)["hex"] == b"new\0".hex()


@pytest.mark.parametrize("preempt", [False, True])
def test_postcopy_with_a_pause_in_its_middle(make: Make, preempt: bool) -> None:
    a, b = filled(make("A")), make("B")
    for site in (a, b):
        site.capability("postcopy-ram")
        site.capability("postcopy-preempt", state=preempt)
    a.parameter("max-postcopy-bandwidth", SLOW_BPS)
    a.qmp.execute("migrate", {"uri": b.address})
    a.qmp.execute("migrate-start-postcopy")
    b.wait_event("running")
    assert pages_of(b)[:3] == WRITTEN[:3]
    a.qmp.execute("migrate-pause")
    wait_until(lambda: a.query()["status"] in ("postcopy-paused", "completed"), "a pause, or all is over")
    if a.query()["status"] == "postcopy-paused":
        a.parameter("max-postcopy-bandwidth", 0)
        a.qmp.execute("migrate", {"uri": b.address, "resume": True})
    a.wait_status("completed")
    b.wait_status("completed")
    assert_sparse(a, b)


def test_where_pages_are_compared(make: Make) -> None:
    """Without a userfaultfd the daemon reads all there is, again and again."""
    launcher = [sys.executable, str(WITHOUT_USERFAULTFD)]
    a, b = filled(make("A", launcher=launcher)), make("B", launcher=launcher)
    go(a, b)
    assert_sparse(a, b)


def test_snapshots(make: Make) -> None:
    a = filled(make("A"))
    run_job(a.qmp, "snapshot-save", "one")
    assert_sparse(a)
    a.poke("heap", 6000 * PAGE, b"\1")
    run_job(a.qmp, "snapshot-load", "one")
    assert_sparse(a)


@pytest.fixture
def reserved() -> Iterator[None]:
    with huge_pages(2 * SIZE // HUGE):
        yield


@pytest.mark.parametrize("way", [{}, {"multifd": True}, {"postcopy_ram": True}], ids=["plain", "multifd", "advised"])
def test_huge_pages(reserved: None, make: Make, way: dict[str, bool]) -> None:
    """What takes memory is counted in huge pages."""
    size = len({page * PAGE // HUGE for page in WRITTEN}) * HUGE
    a, b = filled(make("A", huge_pages=True)), make("B", huge_pages=True)
    go(a, b, **way)
    assert_sparse(a, b, size=size)
    run_job(b.qmp, "snapshot-save", "one")
    assert_sparse(b, size=size)
