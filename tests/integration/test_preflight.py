"""Before anything moves: what stands in the way is said by both sides at once, and nothing has changed afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from migrated.demo.site import Site
from migrated.errors import CommandError
from migrated.wire.preflight import parse_answer
from tests.house.repository import ROOT
from tests.integration.conftest import MIB, MakePager, MakeSite
from tests.integration.test_pager import start_pair
from tests.integration.test_postcopy import RAM_BYTES, follow, leave, switch_on
from tests.support import craft
from tests.support.following import assert_still_runs, migrate, run_state, wait_status, wait_until
from tests.support.hostile import NEEDS
from tests.support.visit import Visit

WITHOUT_USERFAULTFD = ROOT / "tests" / "support" / "without_userfaultfd.py"
MESSAGE = craft.number(0x4D10, 2)


def ask(source: Site, target: Site) -> dict[str, Any]:
    return dict(source.qmp.execute("x-migrated-preflight", {"uri": target.address}))


def ids(verdict: dict[str, Any]) -> list[str]:
    return [blocker["id"] for blocker in verdict["blockers"]]


def ctl(site: Site, *words: str) -> subprocess.CompletedProcess[str]:
    socket = str(site.directory / "run" / "qmp.sock")
    command = [sys.executable, "-m", "migrated.cli.app", "--socket", socket, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


def born(site: Site) -> Site:
    site.qmp.execute("cont")
    site.wait_event("running")
    return site


def files(site: Site) -> list[str]:
    """Return what the daemon has on disk, with the record's text."""
    found = [path for path in site.directory.rglob("*") if path.is_file() and path.suffix == ".json"]
    return sorted(f"{path.relative_to(site.directory)} {path.read_text()}" for path in found)


def test_a_dry_run_moves_nothing_and_leaves_no_trace(pair: tuple[Site, Site]) -> None:
    a, b = pair
    for site in pair:
        switch_on(site, events=True, postcopy_ram=False)
    before = [files(site) for site in pair]
    verdict = ask(a, b)
    assert verdict["blockers"] == []
    assert verdict["ready"]
    assert verdict["checked"] == ["source", "destination"]
    assert verdict["peer"]["kind"] == "migrated"
    assert verdict["destination"] == {"name": "demo", "tool": "migrated 0.1.0"}
    assert_still_runs(a)
    assert run_state(b) == "inmigrate"
    assert "status" not in a.qmp.execute("query-migrate")
    wait_until(lambda: "status" not in b.qmp.execute("query-migrate"), "B waits as before")
    assert [files(site) for site in pair] == before
    migrate(a, b)
    # Nor does it cover up what B knows of the migration that there was.
    known = b.qmp.execute("query-migrate")
    assert ids(ask_back(b, a)) == []
    assert b.qmp.execute("query-migrate")["x-migrated-migration-id"] == known["x-migrated-migration-id"]


def ask_back(source: Site, target: Site) -> dict[str, Any]:
    """Ask a destination whose listener may still have the last source."""
    return dict(wait_until(lambda: (verdict := ask(source, target))["ready"] and verdict, "ready"))


def test_migratectl_says_so(pair: tuple[Site, Site]) -> None:
    a, b = pair
    done = ctl(a, "migrate", "--dry-run", b.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"Ready: nothing stands in the way of a migration to {b.address}",
        "  destination  demo, migrated 0.1.0",
    ]


@pytest.mark.row(28)
def test_all_blockers_of_both_sides_are_named_at_once(make_site: MakeSite) -> None:
    a = born(make_site("A", module="tests.support.misbehave", walker_arguments=["--mode", "fail-on-load"]))
    b = make_site("B", ram_bytes=8 * MIB)
    b.daemon.terminate()
    b.daemon.wait()
    text = b.config.read_text().replace('name = "demo"', 'name = "other"\ntype = "pc"')
    b.config.write_text(text)
    b.restart_daemon()
    wait_until(lambda: b.qmp.execute("x-migrated-query-machine")["blocks"], "the walker attaches again")
    verdict = ask(a, b)
    assert not verdict["ready"]
    assert ids(verdict) == ["machine-type", "block-size", "section-missing", "machine-name"]
    assert [blocker["warning"] for blocker in verdict["blockers"]] == [False, False, False, True]
    # The real thing says the same, and fails before anything was stopped.
    a.qmp.execute("migrate", {"uri": b.address})
    figures = wait_status(a, {"failed"})
    assert ids({"blockers": figures["x-migrated-blockers"]}) == ids(verdict)
    assert figures["x-migrated-outcome"] == "source-owns"
    error = figures["x-migrated-error"]
    assert (error["id"], error["fault"], error["phase"]) == ("preflight-blocked", "setup", "setup")
    assert '"error_id": "preflight-blocked"' in a.log_path.read_text()
    events = []
    while (event := a.qmp.next_event(0)) is not None:
        events.append(event["event"])
    assert "STOP" not in events
    assert_still_runs(a)
    done = ctl(a, "migrate", b.address)
    assert done.returncode == 4
    lines = done.stdout.splitlines()
    assert f"  blocker      destination: {verdict['blockers'][0]['text']} [machine-type]" in lines
    assert "               next: make it equal in both configurations" in lines


def test_a_destination_that_has_a_machine_and_one_that_is_not_there(
    pair: tuple[Site, Site], make_site: MakeSite
) -> None:
    a, b = pair
    c = born(make_site("C"))
    verdict = ask(a, c)
    assert ids(verdict) == ["machine-here"]
    assert "this host owns the machine" in verdict["blockers"][0]["text"]
    verdict = dict(a.qmp.execute("x-migrated-preflight", {"uri": "tcp:127.0.0.1:1"}))
    assert (ids(verdict), verdict["checked"]) == (["link-closed"], ["source"])
    with pytest.raises(CommandError, match="waiting for an incoming migration"):
        ask(b, a)


@pytest.mark.row(29)
def test_memory_that_others_have_reserved_cannot_be_had_twice(pair: tuple[Site, Site]) -> None:
    a, b = pair
    reservation = b.directory / "other" / "memory-reserved.json"
    reservation.parent.mkdir()
    reservation.write_text(json.dumps({"size_bytes": 1 << 60, "until_s": time.monotonic() + 50}))
    assert ids(ask(a, b)) == ["memory-short"]
    reservation.write_text(json.dumps({"size_bytes": 1 << 60, "until_s": time.monotonic() - 1}))
    assert ids(ask(a, b)) == []
    reservation.write_text("not ours")
    switch_on(a, postcopy_ram=False, pause_before_switchover=True)
    a.qmp.execute("migrate", {"uri": b.address})
    wait_status(a, {"pre-switchover"})
    own = b.directory / "run" / reservation.name
    assert 0 < json.loads(own.read_text())["size_bytes"] <= 17 * MIB
    a.qmp.execute("migrate-continue", {"state": "pre-switchover"})
    wait_status(a, {"completed"})
    wait_until(lambda: not own.exists(), "the reservation ends")


def test_a_twin_that_cannot_wait_for_pages_is_no_place_for_postcopy(make_site: MakeSite) -> None:
    a = born(make_site("A"))
    program = (sys.executable, str(WITHOUT_USERFAULTFD), sys.executable, "-m", "migrated.demo.walker")
    b = make_site("B", program=program)
    assert ids(ask(a, b)) == []
    switch_on(a)
    verdict = ask(a, b)
    assert ids(verdict) == ["userfaultfd-missing"]
    assert verdict["blockers"][0]["next-step"].startswith("migrate with postcopy-ram off")


def mount(*words: str) -> int:
    return subprocess.run(["/bin/mount", "-t", "tmpfs", "migrated-test", *words], check=False).returncode


@contextmanager
def mounted(options: str, path: Path) -> Iterator[None]:
    """Put a file system of the test's over a directory; skip where nobody may."""
    if os.geteuid() or mount("-o", options, str(path)):
        pytest.skip("no file system can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", "-l", str(path)], check=True)


@pytest.mark.row(31, 33)
@pytest.mark.parametrize(
    ("options", "expected"), [("size=4k,nr_inodes=9", "state-disk-full"), ("ro", "state-read-only")]
)
def test_a_record_that_cannot_be_written_is_found_before(pair: tuple[Site, Site], options: str, expected: str) -> None:
    for site, side in zip(pair, ("source", "destination"), strict=True):
        with mounted(options, site.directory / "state"):
            verdict = ask(*pair)
            assert [(one["id"], one["side"]) for one in verdict["blockers"]] == [(expected, side)]
    assert ask(*pair)["ready"]


def answers(site: Site, **changes: object) -> Any:
    """Ask as another daemon would, and return what is said."""
    needs = json.dumps({**NEEDS, "dry_run": True, **changes}).encode()
    port = int(site.address.rpartition(":")[2])
    with Visit(port) as visit:
        visit.say(craft.header() + craft.configuration() + craft.open_return_path())
        visit.say(craft.command(0x4D10, b"\0" + needs))
        before = visit.hear_exactly(8 + 4)
        assert before[8:10] == MESSAGE
        length = int.from_bytes(before[10:12], "big")
        return parse_answer(visit.hear_exactly(12 + length)[13:])


@pytest.mark.row(41)
def test_clocks_that_differ_are_told(make_site: MakeSite) -> None:
    site = make_site("A")
    now_ms = time.time_ns() // 1_000_000
    hours = [answers(site, clock_ms=now_ms + ahead).blockers[-1] for ahead in (-3_600_000, 3_600_000)]
    assert [(blocker.id, blocker.warning) for blocker in hours] == [("clock-skew", True)] * 2
    assert [blocker.text.split(" s ")[1] for blocker in hours] == ["ahead of the source's", "behind the source's"]
    assert "clock-skew" not in [blocker.id for blocker in answers(site, clock_ms=now_ms).blockers]


@pytest.mark.row(27)
def test_a_source_of_another_version_hears_both(make_site: MakeSite) -> None:
    blocker = answers(make_site("A"), protocol=99, tool="migrated 9.9.9").blockers[0]
    assert blocker.id == "protocol-version"
    assert "migrated 9.9.9" in blocker.text
    assert "migrated 0.1.0" in blocker.text


def test_the_destination_does_as_its_source_and_forgets_it_again(make_pager: MakePager) -> None:
    a, b = start_pair(make_pager, ram_bytes=RAM_BYTES)
    before = b.qmp.execute("query-migrate-capabilities")
    switch_on(a, postcopy_preempt=True, postcopy_blocktime=True)
    leave(a, b)
    follow(a, b)
    assert "postcopy-blocktime" in b.qmp.execute("query-migrate")
    assert '"event": "second_channel"' in b.log_path.read_text()
    assert b.qmp.execute("query-migrate-capabilities") == before


@pytest.mark.row(36)
def test_the_same_request_twice_is_one_migration(pair: tuple[Site, Site]) -> None:
    a, b = pair
    uri = b.address
    request = {"uri": uri, "x-migrated-request-id": "move-1"}
    a.qmp.execute("migrate", request)
    a.qmp.execute("migrate", request)
    figures = wait_status(a, {"completed"})
    assert figures["x-migrated-migration-id"] == "move-1"
    a.qmp.execute("migrate", request)
    assert a.qmp.execute("query-migrate")["x-migrated-migration-id"] == "move-1"
    with pytest.raises(CommandError, match="is that of a migration to") as refused:
        a.qmp.execute("migrate", {**request, "uri": "tcp:127.0.0.1:1"})
    assert refused.value.error_id == "request-id-reused"
    a.restart_daemon()
    assert "status" not in a.qmp.execute("query-migrate")
    a.qmp.execute("migrate", request)
    answer = a.qmp.execute("query-migrate")
    assert (answer["status"], answer["x-migrated-outcome"]) == ("completed", "destination-owns")
    done = ctl(a, "migrate", "--request-id", "move-1", uri, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["migration-id"] == "move-1"
    with pytest.raises(CommandError):
        a.qmp.execute("migrate", {**request, "x-migrated-request-id": "move-2"})


def test_whoowns_answers_from_disk_on_either_host(pair: tuple[Site, Site]) -> None:
    def whoowns(site: Site) -> dict[str, Any]:
        done = ctl(site, "whoowns", "--json", "--state", str(site.directory / "state"))
        assert done.returncode == 0, done
        return dict(json.loads(done.stdout))

    a, b = pair
    migrate(a, b)
    for site in pair:
        site.daemon.kill()
        site.daemon.wait()
    assert [whoowns(site)["owner"] for site in pair] == ["the other host", "this host"]
    status = ctl(a, "status", "--state", str(a.directory / "state"))
    assert status.returncode == 3
    assert "Failed to connect" in status.stderr
    assert "  owner        the other host" in status.stdout
