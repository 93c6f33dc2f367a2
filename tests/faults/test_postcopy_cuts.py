"""A link that breaks in postcopy costs time, never data: paused, recovered, hashes equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.support.following import assert_moved, assert_still_runs, migrate, run_state, wait_status, wait_until
from tests.support.proxy import Proxy
from tests.support.visit import visit

SLOW_BPS = 4 << 20


def postcopy(*sites: Site) -> None:
    for site in sites:
        on = [{"capability": name, "state": True} for name in ("postcopy-ram", "postcopy-blocktime")]
        site.qmp.execute("migrate-set-capabilities", {"capabilities": on})


def parameter(site: Site, name: str, value: object) -> None:
    site.qmp.execute("migrate-set-parameters", {name: value})


def status(site: Site) -> str:
    return str(site.qmp.execute("query-migrate").get("status"))


@pytest.fixture
def far(pair: tuple[Site, Site]) -> Iterator[tuple[Site, Site, Proxy]]:
    """Two sites and a breakable link; the machine runs at the second, most of its memory is at the first."""
    a, b = pair
    with Proxy(("127.0.0.1", int(b.address.rsplit(":", 1)[1]))) as link:
        postcopy(a, b)
        parameter(a, "max-postcopy-bandwidth", SLOW_BPS)
        a.qmp.execute("migrate", {"uri": link.uri})
        a.qmp.execute("migrate-start-postcopy")
        wait_until(lambda: a.qmp.execute("x-migrated-query-ownership")["record"] == "moved", "B runs it")
        yield a, b, link


def finish(a: Site, b: Site) -> dict[str, Any]:
    parameter(a, "max-postcopy-bandwidth", 0)
    figures = wait_status(a, {"completed"})
    assert_moved(a, b)
    assert b.qmp.execute("x-migrated-query-ownership")["record"] == "owner"
    assert a.qmp.execute("x-migrated-query-ownership")["record"] == "moved"
    return figures


def paused_since(a: Site, b: Site) -> None:
    wait_until(lambda: status(a) != "postcopy-active", "A noticed")
    wait_until(lambda: status(b) != "postcopy-active", "B noticed")


def test_nothing_breaks(far: tuple[Site, Site, Proxy]) -> None:
    a, b, _ = far
    assert b.qmp.execute("x-migrated-query-ownership")["record"] == "incomplete"
    assert run_state(a) == "finish-migrate"
    figures = finish(a, b)
    there = wait_status(b, {"completed"})
    assert figures["x-migrated-faults"] == there["x-migrated-faults"]
    faults = there["x-migrated-faults"]
    assert faults["requests"] == faults["remote"]["count"] > 0
    assert there["postcopy-blocktime"] <= sum(there["postcopy-vcpu-blocktime"]) + 1


@pytest.mark.row(17)
def test_a_link_that_breaks_twice_is_mended_by_itself(far: tuple[Site, Site, Proxy]) -> None:
    a, b, link = far
    for _ in range(2):
        link.cut()
        paused_since(a, b)
        wait_status(a, {"postcopy-active"})
        wait_until(lambda: status(b) == "postcopy-active", "B goes on")
    assert "error-desc" not in a.qmp.execute("query-migrate")
    finish(a, b)


@pytest.mark.row(19)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_direction_that_goes_silent_is_noticed(far: tuple[Site, Site, Proxy], direction: str) -> None:
    """Heartbeats show it, though the kernel knows of nothing."""
    a, b, link = far
    for site in (a, b):
        parameter(site, "x-migrated-silence-timeout", 1000)
    link.cut()  # the new deadline holds from the next connection on
    paused_since(a, b)
    wait_status(a, {"postcopy-active"})
    way = getattr(link, direction)
    way.at_limit, way.limit = "swallow", way.passed
    paused_since(a, b)
    link.resume()
    link.cut()
    wait_status(a, {"postcopy-active"})
    finish(a, b)


@pytest.mark.row(44)
def test_an_operator_pauses_and_goes_on_elsewhere(far: tuple[Site, Site, Proxy]) -> None:
    a, b, _ = far
    a.qmp.execute("migrate-pause")
    wait_status(a, {"postcopy-paused"})
    wait_until(lambda: status(b) == "postcopy-paused", "B noticed")
    with pytest.raises(CommandError, match="Postcopy migration in progress, cannot cancel"):
        a.qmp.execute("migrate_cancel")
    with pytest.raises(CommandError, match="There's a migration process in progress"):
        a.qmp.execute("migrate", {"uri": b.address})
    b.qmp.execute("migrate-recover", {"uri": "tcp:127.0.0.1:0"})
    a.qmp.execute("migrate", {"uri": "tcp:127.0.0.1:1", "resume": True})
    wait_until(lambda: "Connection refused" in a.qmp.execute("query-migrate").get("error-desc", ""), "it was tried")
    wait_until(lambda: _resume(a, b.address), "A resumes")
    finish(a, b)


def _resume(site: Site, uri: str) -> bool:
    try:
        site.qmp.execute("migrate", {"uri": uri, "resume": True})
    except CommandError:
        return False
    return True


def test_a_stranger_at_a_paused_destination_changes_nothing(far: tuple[Site, Site, Proxy]) -> None:
    a, b, _ = far
    a.qmp.execute("migrate-pause")
    wait_status(a, {"postcopy-paused"})
    wait_until(lambda: status(b) == "postcopy-paused", "B noticed")
    visit(int(b.address.rsplit(":", 1)[1]), b"GET / HTTP/1.1\r\n\r\n", end=True)
    wait_until(lambda: "Unknown savevm section type" in b.qmp.execute("query-migrate").get("error-desc", ""), "refused")
    a.qmp.execute("migrate", {"uri": b.address, "resume": True})
    finish(a, b)


@pytest.mark.row(18)
def test_requests_go_over_a_connection_of_their_own(pair: tuple[Site, Site]) -> None:
    a, b = pair
    postcopy(a, b)
    for site in (a, b):
        on = [{"capability": "postcopy-preempt", "state": True}]
        site.qmp.execute("migrate-set-capabilities", {"capabilities": on})
    parameter(a, "max-postcopy-bandwidth", SLOW_BPS)
    a.qmp.execute("migrate", {"uri": b.address})
    a.qmp.execute("migrate-start-postcopy")
    wait_status(a, {"postcopy-active"})
    for _ in range(2):
        wait_until(lambda: a.qmp.execute("x-migrated-query-ownership")["record"] == "moved", "B runs it")
        wait_until(lambda: status(b) == "postcopy-active", "B goes on")
        b.qmp.execute("migrate-pause")
        paused_since(a, b)
        wait_status(a, {"postcopy-active"})
    figures = finish(a, b)
    assert figures["x-migrated-faults"]["remote"]["count"] > 0


def test_commands_out_of_place(pair: tuple[Site, Site]) -> None:
    a, b = pair
    with pytest.raises(CommandError, match="Enable postcopy with migrate_set_capability before the start"):
        a.qmp.execute("migrate-start-postcopy")
    postcopy(a)
    with pytest.raises(CommandError, match="Postcopy must be started after migration has been started"):
        a.qmp.execute("migrate-start-postcopy")
    with pytest.raises(CommandError, match="only supported during postcopy-active or postcopy-recover"):
        a.qmp.execute("migrate-pause")
    with pytest.raises(CommandError, match="can only be run when postcopy is paused"):
        b.qmp.execute("migrate-recover", {"uri": "tcp:127.0.0.1:0"})
    with pytest.raises(CommandError, match="Cannot resume if there is no paused migration"):
        a.qmp.execute("migrate", {"uri": b.address, "resume": True})
    assert_still_runs(a)


COMMIT = bytes.fromhex("08 4d03 002a")


def test_a_commit_that_is_lost_is_said_again(pair: tuple[Site, Site], tmp_path: Path) -> None:
    """The source has let go, the destination has not heard it: nobody runs until the link is back; then one does."""
    a, b = pair
    with Proxy(("127.0.0.1", int(b.address.rsplit(":", 1)[1]))) as link:
        postcopy(a, b)
        link.forward.cut_before = COMMIT
        a.qmp.execute("migrate", {"uri": link.uri})
        a.qmp.execute("migrate-start-postcopy")
        wait_until(link.forward.hit.is_set, "the commit was lost")
        finish(a, b)


def test_a_source_that_took_its_machine_back_may_come_again(pair: tuple[Site, Site]) -> None:
    """The devices are loaded, and the source has not heard it: it goes on, and the destination takes it in later."""
    a, b = pair
    with Proxy(("127.0.0.1", int(b.address.rsplit(":", 1)[1]))) as link:
        postcopy(a, b)
        link.backward.cut_before = bytes.fromhex("0002 0004 00000003")
        a.qmp.execute("migrate", {"uri": link.uri})
        a.qmp.execute("migrate-start-postcopy")
        figures = wait_status(a, {"failed"})
        assert figures["x-migrated-outcome"] == "source-owns"
        assert_still_runs(a)
        assert run_state(b) == "inmigrate"
        migrate(a, b)


@pytest.mark.parametrize("phase", ["saving", "loading"])
def test_a_cut_before_the_devices_are_loaded_resumes_the_source(
    phase: str, held_pair: tuple[Site, Site], link: Proxy, hold: Path
) -> None:
    a, b = held_pair
    postcopy(a, b)
    (hold / {"saving": "hold-save", "loading": "hold-load"}[phase]).touch()
    a.qmp.execute("migrate", {"uri": link.uri})
    a.qmp.execute("migrate-start-postcopy")
    wait_until((hold / phase).exists, phase)
    link.cut()
    (hold / {"saving": "hold-save", "loading": "hold-load"}[phase]).unlink()
    assert wait_status(a, {"failed"})["x-migrated-outcome"] == "source-owns"
    assert_still_runs(a)
    for path in hold.iterdir():
        path.unlink()
    wait_until(lambda: status(b) in ("failed", "postcopy-paused"), "B noticed")
    migrate(a, b)
