"""What operators look at: after a migration that failed, one there, and one whose daemon was killed."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from migrated.daemon.history import FileHistoryStore
from migrated.demo.site import Site
from migrated.model.history import listed
from tests.integration.conftest import MIB
from tests.integration.test_postcopy import speed, switch_on
from tests.support.following import migrate, wait_status, wait_until
from tests.support.qmp_schema import QmpSchema

SLOW_BPS = 1 << 20
METRICS = '[metrics]\nlisten = "127.0.0.1:0"\n'
NOBODY = "tcp:127.0.0.1:1"


@dataclass(frozen=True)
class Story:
    """Two sites, and the ids of what happened between them."""

    a: Site
    b: Site
    refused: str
    moved: str
    address: str
    """Where it went."""
    killed: str
    during: tuple[dict[str, float], dict[str, float]]
    """What source and destination told Prometheus in the middle of that."""


def reports(site: Site) -> dict[str, dict[str, Any]]:
    return {one["id"]: one for one in site.qmp.execute("x-migrated-query-history")}


def report(site: Site, wanted: str) -> dict[str, Any]:
    found: dict[str, Any] = site.qmp.execute("x-migrated-query-report", {"id": wanted})
    return found


def log_of(site: Site) -> list[dict[str, Any]]:
    return [json.loads(line) for line in site.log_path.read_text().splitlines()]


def scrape(site: Site) -> dict[str, float]:
    """Ask as Prometheus does; return every sample as it is written."""
    (listening,) = [line for line in log_of(site) if line["event"] == "metrics_listening"]
    with urllib.request.urlopen(f"http://{listening['addresses'][0]}/metrics", timeout=50) as answer:
        lines = answer.read().decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line and not line.startswith("#")
    }


def ctl(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migrated.cli.app", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=50)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """A: refused by nobody's port, then moved to B. B: on its way back when it is killed."""
    directory = tmp_path_factory.mktemp("operators")
    options: dict[str, Any] = {"ram_bytes": 16 * MIB, "config": METRICS}
    with Site("A", directory, **options) as a, Site("B", directory, **options) as b:
        a.qmp.execute("cont")
        a.wait_event("running")
        a.qmp.execute("migrate", {"uri": NOBODY})
        refused = wait_status(a, {"failed"})["x-migrated-migration-id"]
        address = b.address
        moved = migrate(a, b)["x-migrated-migration-id"]
        b.qmp.execute("migrate-set-parameters", {"max-bandwidth": SLOW_BPS})
        b.qmp.execute("migrate", {"uri": a.address, "x-migrated-request-id": "way-back"})
        wait_until(lambda: reports(a).get("way-back", {}).get("transferred"), "pages arrive at A")
        during = scrape(b), scrape(a)
        b.restart_daemon()
        wait_status(a, {"failed"})
        wait_until(lambda: b.qmp.execute("x-migrated-query-machine")["blocks"], "the walker re-attached")
        yield Story(a, b, refused, moved, address, "way-back", during)


def test_each_migration_leaves_a_report_at_both_hosts(story: Story) -> None:
    here, there = reports(story.a), reports(story.b)
    assert list(here) == [story.killed, story.moved, story.refused]
    assert list(there) == [story.killed, story.moved]
    assert [one["direction"] for one in here.values()] == ["incoming", "outgoing", "outgoing"]
    assert [one["status"] for one in here.values()] == ["failed", "completed", "failed"]
    assert [one["status"] for one in there.values()] == ["interrupted", "completed"]
    assert {one["outcome"] for one in (here[story.moved], there[story.moved])} == {"destination-owns"}
    assert {one["outcome"] for one in (here[story.killed], there[story.killed])} == {"source-owns"}
    assert all(one["started"] <= one["ended"] for one in here.values())


def test_a_report_has_the_figures_and_the_reason(story: Story) -> None:
    moved, arrived = report(story.a, story.moved[:8]), report(story.b, story.moved[:8])
    assert moved["migration"]["downtime"] > 0
    assert moved["migration"]["ram"]["transferred"] > 0
    assert moved["uri"] == story.address
    assert "uri" not in arrived
    assert arrived["migration"]["ram"]["total"] == 16 * MIB
    refused = report(story.a, story.refused)
    assert (refused["uri"], refused["error-id"], refused["outcome"]) == (NOBODY, "link-closed", "source-owns")
    assert refused["migration"]["error-desc"] == refused["error"]
    cut = report(story.a, story.killed)
    assert cut["migration"]["ram"]["transferred"] > 0, "also of one that failed it is told how far it came"


def test_reports_are_what_the_schema_says(story: Story) -> None:
    schema = QmpSchema(story.a.qmp.execute("query-qmp-schema"))
    for site in (story.a, story.b):
        history = site.qmp.execute("x-migrated-query-history")
        schema.check(schema.entries["x-migrated-query-history"]["ret-type"], history, "history")
        for one in history:
            answer = report(site, one["id"])
            schema.check(schema.entries["x-migrated-query-report"]["ret-type"], answer, one["id"])


def test_the_disk_says_the_same_as_the_daemon(story: Story) -> None:
    for site in (story.a, story.b):
        found = FileHistoryStore(site.directory / "state", keep=0).reports()
        assert listed(found) == site.qmp.execute("x-migrated-query-history")
    shown = ctl("report", story.moved[:8], "--state", str(story.b.directory / "state"))
    assert shown.stdout.startswith("Migration from 127.0.0.1:")
    assert f"  id           {story.moved}\n" in shown.stdout


def test_every_line_about_a_migration_has_its_id_and_role(story: Story) -> None:
    # What a source is called is known only when it has said so, behind the first status.
    about = [line for line in log_of(story.a) if line["event"] == "migration_status" and line["status"] != "active"]
    roles = {line["migration_id"]: line["role"] for line in about}
    assert roles == {story.refused: "outgoing", story.moved: "outgoing", story.killed: "incoming"}
    lost = [line["migration_id"] for line in log_of(story.b) if line["event"] == "migration_interrupted"]
    assert lost == [story.killed]


def test_metrics_of_both_hosts(story: Story) -> None:
    here, there = scrape(story.a), scrape(story.b)
    ended = 'migrated_migrations_total{{direction="{}",result="{}"}}'
    counts = [here[ended.format(*which)] for which in (("outgoing", "failed"), ("outgoing", "completed"))]
    assert (counts, here[ended.format("incoming", "failed")]) == ([1, 1], 1)
    figures = report(story.a, story.moved)["migration"]
    sent = {phase: here[f'migrated_migration_sent_bytes_total{{phase="{phase}"}}'] for phase in ("precopy", "downtime")}
    assert sent == {phase: figures["ram"][f"{phase}-bytes"] for phase in sent}
    assert round(here["migrated_last_migration_downtime_seconds"] * 1000) == figures["downtime"]
    assert here["migrated_migration_received_bytes_total"] > 0
    assert here['migrated_migration_status{direction="incoming",status="failed"}'] == 1
    assert here['migrated_ownership_record{record="moved"}'] == 1
    assert there['migrated_ownership_record{record="owner"}'] == 1
    assert there['migrated_machine_run_state{state="running"}'] == 1
    assert there["migrated_ram_bytes"] == 16 * MIB
    assert there["migrated_workloads"] == 1
    assert here["migrated_iothread_lock_hold_seconds_count"] > 0
    assert there[ended.format("outgoing", "failed")] == 0, "the one that was killed counted nothing"


def test_metrics_of_a_migration_under_way(story: Story) -> None:
    source, target = story.during
    assert source['migrated_migration_status{direction="outgoing",status="active"}'] == 1
    assert source["migrated_migration_remaining_bytes"] > 0
    assert source["migrated_migration_passes"] > 0
    assert source['migrated_migration_sent_bytes_total{phase="precopy"}'] > 0
    assert target['migrated_migration_status{direction="incoming",status="active"}'] == 1
    assert target["migrated_migration_received_bytes_total"] > 0
    assert target["migrated_migration_remaining_bytes"] == 0


def test_faults_are_counted_where_they_happen(story: Story) -> None:
    """The machine moves once more."""
    a, b = story.a, story.b
    switch_on(b)
    speed(b, SLOW_BPS)
    b.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
    b.qmp.execute("migrate", {"uri": a.address})
    b.qmp.execute("migrate-start-postcopy")
    wait_until(lambda: scrape(a)['migrated_postcopy_fault_seconds_count{answered="remote"}'], "a fault is counted")
    speed(b, 0)
    migration_id = wait_status(b, {"completed"})["x-migrated-migration-id"]
    wait_until(lambda: "ended" in reports(a)[migration_id], "it is all there")
    faults = report(a, migration_id)["migration"]["x-migrated-faults"]
    here, there = scrape(a), scrape(b)
    assert here['migrated_postcopy_fault_seconds_count{answered="remote"}'] == faults["remote"]["count"]
    assert there["migrated_postcopy_requests_total"] > 0
    assert there['migrated_migration_sent_bytes_total{phase="postcopy"}'] > 0
    assert there['migrated_postcopy_fault_seconds_count{answered="remote"}'] == 0


def test_without_a_daemon_the_disk_has_everything(story: Story) -> None:
    """The last one: it ends a daemon."""
    a = story.a
    known = a.qmp.execute("x-migrated-query-history")
    a.daemon.terminate()
    a.daemon.wait()
    socket, state = str(a.directory / "run" / "qmp.sock"), str(a.directory / "state")
    shown = ctl("--socket", socket, "--json", "history", "--state", state)
    assert (shown.returncode, json.loads(shown.stdout)) == (0, known)
