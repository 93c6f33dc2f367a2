"""Following a migration over QMP, and the oracle of every migration that completes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from migrated.daemon.record import FileRecordStore
from migrated.demo.site import Site

#: Generous: these machines are noisy, and nothing is asserted about time.
DEADLINE_S = 60.0
ENDED = frozenset({"completed", "failed", "cancelled"})


def wait_until(probe: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Ask until ``probe`` gives something true."""
    deadline = time.monotonic() + deadline_s
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.01)
    return found


def wait_status(site: Site, statuses: Collection[str]) -> dict[str, Any]:
    """Wait until query-migrate shows one of ``statuses``; return that answer."""

    def probe() -> dict[str, Any] | None:
        answer: dict[str, Any] = site.qmp.execute("query-migrate")
        if answer.get("status") in statuses:
            return answer
        assert answer.get("status") not in ENDED - set(statuses), f"ended otherwise: {answer}\n{site.log_tail()}"
        return None

    return dict(wait_until(probe, f"{site.name} in {sorted(statuses)}\n{site.log_tail()}"))


def migrate(source: Site, target: Site, *, uri: str | None = None) -> dict[str, Any]:
    """Migrate, wait for completed, and hold the oracle against it; return query-migrate's last answer."""
    source.qmp.execute("migrate", {"uri": uri or target.address})
    figures = wait_status(source, {"completed"})
    assert_moved(source, target)
    return figures


def assert_moved(source: Site, target: Site) -> None:
    """RAM at the target equals RAM at the source at the moment it stopped; exactly the target runs."""
    left = source.wait_event("moved")
    target.wait_event("running")
    arrived = target.check()
    assert left["invariant"]
    assert arrived["invariant"]
    assert (left["steps"], left["hash"]) == (arrived["at"], arrived["hash"])
    assert run_state(source) == "postmigrate"
    assert run_state(target) == "running"


def assert_still_runs(site: Site) -> None:
    """The machine runs here, walks on, and its memory is whole."""
    assert run_state(site) == "running", site.log_tail()
    before = site.check()
    after = site.check()
    assert before["invariant"]
    assert after["invariant"]
    assert after["steps"] > before["steps"]


def run_state(site: Site) -> str:
    """Return query-status' status."""
    return str(site.qmp.execute("query-status")["status"])


def record_of(site: Site) -> dict[str, Any]:
    """Return what stands on the site's disk about who owns the machine."""
    return FileRecordStore(site.directory / "state").read() or {"hold": "none"}
