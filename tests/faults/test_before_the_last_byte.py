"""Up to the last byte: every cancel and failure leaves the source running, able to migrate again at once."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.support.following import assert_still_runs, migrate, run_state, wait_status, wait_until
from tests.support.proxy import Proxy

SLOW_BPS = 2 << 20


@contextmanager
def silent_listener() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"


def capability(site: Site, name: str, state: bool = True) -> None:
    site.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state}]})


def parameter(site: Site, name: str, value: object) -> None:
    site.qmp.execute("migrate-set-parameters", {name: value})


def lead_to(phase: str, source: Site, uri: str, hold: Path) -> None:
    """Start a migration and return when it stands in ``phase``."""
    if phase == "active":
        parameter(source, "max-bandwidth", SLOW_BPS)
    elif phase == "pre-switchover":
        capability(source, "pause-before-switchover")
    elif phase == "saving":
        (hold / "hold-save").touch()
    source.qmp.execute("migrate", {"uri": uri})
    if phase == "saving":
        wait_until((hold / phase).exists, f"{phase}\n{source.log_tail()}")
    else:
        wait_status(source, {phase})


def back_to_normal(source: Site, hold: Path) -> None:
    parameter(source, "max-bandwidth", 0)
    capability(source, "pause-before-switchover", state=False)
    for path in hold.iterdir():
        path.unlink()


PHASES = ["active", "pre-switchover", "saving"]


@pytest.mark.parametrize("phase", PHASES)
def test_cancel_resumes_the_source(phase: str, held_pair: tuple[Site, Site], hold: Path) -> None:
    a, b = held_pair
    lead_to(phase, a, b.address, hold)
    a.qmp.execute("migrate_cancel")
    a.qmp.execute("migrate_cancel")
    figures = wait_status(a, {"cancelled"})
    assert figures["x-migrated-outcome"] == "source-owns"
    assert_still_runs(a)
    back_to_normal(a, hold)
    wait_until(lambda: run_state(b) == "inmigrate", "B waits again")
    migrate(a, b)


def test_cancel_in_setup(held_pair: tuple[Site, Site], hold: Path) -> None:
    a, b = held_pair
    with silent_listener() as uri:
        lead_to("setup", a, uri, hold)
        with pytest.raises(CommandError, match="There's a migration process in progress"):
            a.qmp.execute("migrate", {"uri": uri})
        a.qmp.execute("migrate_cancel")
        wait_status(a, {"cancelled"})
    assert_still_runs(a)
    migrate(a, b)


@pytest.mark.parametrize("phase", PHASES)
def test_a_cut_link_resumes_the_source(phase: str, held_pair: tuple[Site, Site], link: Proxy, hold: Path) -> None:
    a, b = held_pair
    lead_to(phase, a, link.uri, hold)
    link.cut()
    figures = wait_status(a, {"failed"})
    back_to_normal(a, hold)
    assert figures["error-desc"]
    assert figures["x-migrated-outcome"] == "source-owns"
    assert_still_runs(a)
    wait_until(lambda: b.qmp.execute("query-migrate")["status"] == "failed", "B noticed")
    assert run_state(b) == "inmigrate"
    migrate(a, b)


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_destination_resumes_the_source(
    phase: str, held_pair: tuple[Site, Site], hold: Path, make_site: Callable[..., Site]
) -> None:
    a, b = held_pair
    lead_to(phase, a, b.address, hold)
    os.kill(b.daemon.pid, signal.SIGKILL)
    assert wait_status(a, {"failed"})["x-migrated-outcome"] == "source-owns"
    back_to_normal(a, hold)
    assert_still_runs(a)
    c = make_site("C", config='[handlers]\nload = ["tests.support.held_device:register"]\n')
    migrate(a, c)


def test_nobody_listens(held_pair: tuple[Site, Site]) -> None:
    a, b = held_pair
    with silent_listener() as uri:
        free = uri
    a.qmp.execute("migrate", {"uri": free})
    figures = wait_status(a, {"failed"})
    assert "Failed to connect to" in figures["error-desc"]
    assert "Connection refused" in figures["error-desc"]
    assert_still_runs(a)
    migrate(a, b)


def refuse_by_size(make_site: Callable[..., Site]) -> Site:
    return make_site("small", ram_bytes=8 << 20)


def refuse_by_running(make_site: Callable[..., Site]) -> Site:
    site = make_site("busy")
    site.qmp.execute("cont")
    return site


@pytest.mark.row(28)
@pytest.mark.parametrize(
    ("make_target", "reason"),
    [
        (refuse_by_size, r"RAM block heap has 16777216 bytes, and here 8388608"),
        (refuse_by_running, r"this host owns the machine"),
    ],
)
def test_the_destinations_reason_reaches_the_source(
    pair: tuple[Site, Site], make_site: Callable[..., Site], make_target: Any, reason: str
) -> None:
    a, b = pair
    a.qmp.execute("migrate", {"uri": make_target(make_site).address})
    figures = wait_status(a, {"failed"})
    assert figures["error-desc"].startswith("nothing was moved: destination: ")
    assert reason in figures["error-desc"]
    assert_still_runs(a)
    migrate(a, b)


def test_a_machine_does_not_leave_without_its_workload(make_site: Callable[..., Site]) -> None:
    a, b = make_site("A", module=""), make_site("B", module="")
    a.qmp.execute("cont")
    with pytest.raises(CommandError, match=r"there is nothing to migrate.*start its workload"):
        a.qmp.execute("migrate", {"uri": b.address})
    assert a.qmp.execute("x-migrated-query-ownership")["record"] == "owner"


@pytest.mark.row(24)
@pytest.mark.parametrize("at", [100_000, 9_000_001])
def test_a_bit_that_changes_on_the_way_is_found(held_pair: tuple[Site, Site], link: Proxy, at: int) -> None:
    """TCP's own checksum lets one through every now and then; here it is in a page that is sent once."""
    a, b = held_pair
    a.qmp.execute("stop")
    link.forward.flip_at = at
    a.qmp.execute("migrate", {"uri": link.uri})
    figures = wait_status(a, {"failed"})
    assert "what arrived is not what was sent" in figures["error-desc"]
    assert "1 others in block" in figures["error-desc"]
    assert figures["x-migrated-outcome"] == "source-owns"
    a.qmp.execute("cont")
    assert_still_runs(a)
    link.forward.flip_at = None
    migrate(a, b, uri=link.uri)


@pytest.mark.row(24)
def test_a_bit_that_changes_on_the_way_in_a_page_that_comes_again(held_pair: tuple[Site, Site], link: Proxy) -> None:
    """The walker writes to every page: in the end all is as it was sent, which it proves there."""
    a, b = held_pair
    link.forward.flip_at = 100_000
    migrate(a, b, uri=link.uri)


@pytest.mark.row(24)
def test_a_bit_that_changes_in_a_postcopy_package_is_found(held_pair: tuple[Site, Site], link: Proxy) -> None:
    a, b = held_pair
    for site in held_pair:
        capability(site, "postcopy-ram")
    # In the blanks behind the run state, which nobody looks at.
    link.forward.flip_behind = b"globalstate" + bytes.fromhex("00000000 00000001 000000"), 80
    a.qmp.execute("migrate", {"uri": link.uri})
    a.qmp.execute("migrate-start-postcopy")
    figures = wait_status(a, {"failed"})
    assert link.forward.hit.is_set()
    assert "what arrived is not what was sent" in figures["error-desc"]
    assert figures["x-migrated-outcome"] == "source-owns"
    assert_still_runs(a)
    migrate(a, b)
