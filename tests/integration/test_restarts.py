"""What a daemon that restarts still knows, and what an operator may ask of a machine that is on its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from tests.integration.conftest import MakeSite
from tests.integration.test_workloads import memory_of
from tests.support.following import assert_moved, assert_still_runs, migrate, run_state, wait_status, wait_until

SLOW_BPS = 2 << 20
#: 16 MiB take several times the deadline of `wait_status`.
END_IS_FAR_BPS = 64 << 10


def attached(site: Site) -> Any:
    return site.qmp.execute("x-migrated-query-machine")["workloads"]


def test_a_machine_that_was_stopped_stays_stopped(pair: tuple[Site, Site]) -> None:
    a, _ = pair
    a.qmp.execute("stop")
    before = memory_of(a)
    a.restart_daemon()
    wait_until(lambda: attached(a), "the walker re-attached")
    assert run_state(a) == "paused"
    assert memory_of(a) == before
    a.qmp.execute("cont")
    assert_still_runs(a)
    a.restart_daemon()
    wait_until(lambda: attached(a), "the walker re-attached")
    assert_still_runs(a)


def test_a_machine_that_arrived_stopped_stays_stopped(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.qmp.execute("stop")
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"completed"})
    wait_until(lambda: run_state(b) == "paused", "B has it")
    b.restart_daemon()
    wait_until(lambda: attached(b), "the walker re-attached")
    assert run_state(b) == "paused"
    b.qmp.execute("cont")
    assert_moved(a, b)


def load_in_part(a: Site, b: Site) -> None:
    """Migrate until pages have arrived, and give up."""
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": SLOW_BPS})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: b.qmp.execute("query-migrate").get("ram", {}).get("normal"), "pages arrive")
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    wait_until(lambda: b.qmp.execute("query-migrate")["status"] == "failed", "B noticed")
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})


def test_memory_that_came_in_part_is_never_run(pair: tuple[Site, Site]) -> None:
    a, b = pair
    load_in_part(a, b)
    for restarts in range(2):
        with pytest.raises(CommandError, match=r"loaded only in part\. Next: migrate it again; or, to begin afresh"):
            b.qmp.execute("cont")
        assert b.qmp.execute("x-migrated-query-ownership")["record"] == "partial"
        if not restarts:
            b.restart_daemon()
            wait_until(lambda: attached(b), "the walker re-attached")
            assert run_state(b) == "inmigrate"
    migrate(a, b)
    assert b.qmp.execute("x-migrated-query-ownership")["record"] == "owner"


def test_a_host_with_half_a_machine_can_begin_afresh(pair: tuple[Site, Site]) -> None:
    a, b = pair
    load_in_part(a, b)
    with pytest.raises(CommandError, match=r"still mapped by walker-B\. Next: end it, then release again"):
        b.qmp.execute("x-migrated-release")
    b.stop_walker()
    wait_until(lambda: not attached(b), "it left")
    b.qmp.execute("x-migrated-release")
    b.start_walker()
    b.qmp.execute("cont")
    b.wait_event("running")
    assert_still_runs(b)


def test_a_twin_that_dies_ends_the_migration_long_before_its_end(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": END_IS_FAR_BPS})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_until(lambda: b.qmp.execute("query-migrate").get("ram", {}).get("normal"), "pages arrive")
    b.stop_walker()
    figures = wait_status(a, {"failed"})
    assert "the destination refused: workload walker-B" in figures["error-desc"]
    assert_still_runs(a)
    a.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    wait_until(lambda: b.qmp.execute("query-migrate")["status"] == "failed", "B noticed")
    b.start_walker()
    migrate(a, b)


def test_stop_before_it_comes_keeps_it_paused(pair: tuple[Site, Site]) -> None:
    a, b = pair
    b.qmp.execute("stop")
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"completed"})
    wait_until(lambda: run_state(b) == "paused", "B has it")
    b.qmp.execute("cont")
    assert_moved(a, b)
    migrate(b, a)
    migrate(a, b)  # the wish was for that one arrival


def test_stop_in_pre_switchover_says_what_to_do(pair: tuple[Site, Site]) -> None:
    a, b = pair
    on = [{"capability": "pause-before-switchover", "state": True}]
    a.qmp.execute("migrate-set-capabilities", {"capabilities": on})
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"pre-switchover"})
    with pytest.raises(CommandError, match=r"stopped for its switchover.*Next: `migrate_cancel`, then `stop`"):
        a.qmp.execute("stop")
    a.qmp.execute("migrate_cancel")
    wait_status(a, {"cancelled"})
    assert_still_runs(a)


def test_a_listener_for_everybody_needs_keys_or_names(make_site: MakeSite) -> None:
    site = make_site("B", incoming="defer", module="")
    with pytest.raises(CommandError, match=r"0\.0\.0\.0.*can be reached from other hosts.*no keys.*migratectl pki"):
        site.qmp.execute("migrate-incoming", {"uri": "tcp:0.0.0.0:0"})
    site.qmp.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    clear = '[tls]\nmode = "off"\n'
    unnamed = make_site("D", incoming="defer", module="", config=clear)
    with pytest.raises(CommandError, match=r"0\.0\.0\.0.*can be reached from other hosts, in cleartext.*allow = "):
        unnamed.qmp.execute("migrate-incoming", {"uri": "tcp:0.0.0.0:0"})
    named = make_site("C", incoming="defer", allow=["127.0.0.1"], module="", config=clear)
    named.qmp.execute("migrate-incoming", {"uri": "tcp:0.0.0.0:0"})


def test_a_file_that_could_not_be_loaded_is_not_in_the_way(make_site: MakeSite, tmp_path: Path) -> None:
    a, b = make_site("A"), make_site("B", incoming="defer")
    a.qmp.execute("cont")
    a.wait_event("running")
    (tmp_path / "bad").write_bytes(b"not a stream")
    a.qmp.execute("migrate", {"uri": f"file:{tmp_path}/good"})
    wait_status(a, {"completed"})
    b.qmp.execute("migrate-incoming", {"uri": f"file:{tmp_path}/bad"})
    wait_status(b, {"failed"})
    wait_until(lambda: "socket-address" not in b.qmp.execute("query-migrate"), "that listener is over")
    b.qmp.execute("migrate-incoming", {"uri": f"file:{tmp_path}/good"})
    assert_moved(a, b)
