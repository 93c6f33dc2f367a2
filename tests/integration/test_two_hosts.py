"""Two hosts with a booted systemd each, joined by a cable: the Debian package, and README's way from nothing to a move.

Both are overlays of this host's root, so that everything is installed and written as on a real one; all of it is gone
afterwards. One boot for all tests here; what was seen is judged here, what is done is in `tests.support.two_hosts`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.two_hosts import ADDRESSES, MACHINE, Scene, build_package, play, two_hosts

TOOLS = ("systemd-nspawn", "setpriv", "unshare", "nsenter", "ip", "dpkg-deb")

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="machines are booted as root"),
    pytest.mark.skipif(
        bool(missing := [tool for tool in TOOLS if shutil.which(tool) is None]), reason=f"{missing} are not installed"
    ),
    pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="the package needs Debian's python3"),
    pytest.mark.skipif(not Path("/usr/lib/systemd/systemd").exists(), reason="systemd itself is not installed"),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened, once for all tests here."""
    directory = tmp_path_factory.mktemp("two-hosts")
    packages = directory / "packages"
    packages.mkdir()
    (directory / "probe").mkdir()
    if reason := Scene("probe", directory / "probe", packages, {}).why_not():
        pytest.skip(reason)
    package = build_package(packages)
    with two_hosts(directory, packages) as (a, b):
        return play(a, b, package)


def of(seen: dict[str, Any], member: str) -> Any:
    assert member in seen, f"it did not get that far:\n{seen['error']}"
    return seen[member]


def test_the_package_installs_and_starts_nothing(seen: dict[str, Any]) -> None:
    assert of(seen, "installed") == {
        "status": "install ok installed",
        "changed": "",
        "units": "",
        "enabled": "disabled",
        "verified": "",
        "user": "migrated",
    }


def test_the_shell_completes(seen: dict[str, Any]) -> None:
    assert of(seen, "completion") == ["verify"]
    assert of(seen, "names") == [MACHINE]


def test_three_commands_pair_two_hosts(seen: dict[str, Any]) -> None:
    assert of(seen, "commands") == 3
    to_b, to_a = of(seen, "trust")
    assert to_b.startswith(f"{ADDRESSES['host-b']} and this host trust each other: it is 'host-b'")
    assert to_a.startswith(f"{ADDRESSES['host-a']} and this host trust each other: it is 'host-a'")


def test_keys_are_the_daemons_to_read_and_nobody_elses(seen: dict[str, Any]) -> None:
    assert of(seen, "keys") == {"host-a": {"640 root:migrated"}, "host-b": {"640 root:migrated"}}
    assert of(seen, "other keys") == {"600 root:root"}


def test_both_units_wait_for_a_machine(seen: dict[str, Any]) -> None:
    for started in of(seen, "started"):
        assert (started["ActiveState"], started["SubState"], started["NRestarts"]) == ("active", "running", "0")
        assert (started["User"], started["UnitFileState"]) == ("migrated", "enabled")
    assert of(seen, "waiting") == ["inmigrate", "inmigrate"]


@pytest.mark.parametrize("way", ["there", "back"])
def test_the_machine_moves_and_nothing_is_lost(seen: dict[str, Any], way: str) -> None:
    moved = of(seen, way)
    left, arrived = moved["left"], moved["arrived"]
    assert moved["report"]["status"] == "completed"
    assert left["invariant"]
    assert arrived["invariant"]
    assert (left["steps"], left["hash"]) == (arrived["at"], arrived["hash"])
    assert arrived["steps"] > left["steps"]


def test_one_way_was_precopy_and_one_postcopy(seen: dict[str, Any]) -> None:
    assert of(seen, "there")["report"].get("faults") is None
    assert of(seen, "back")["report"]["faults"]["remote"]["count"] > 0


@pytest.mark.parametrize("way", ["there", "back"])
def test_both_records_say_the_same(seen: dict[str, Any], way: str) -> None:
    here, there = of(seen, way)["owners"]
    assert (here["owner"], there["owner"]) == ("the other host", "this host")
    assert here["epoch"] == there["epoch"]
    assert here["migration-id"] == there["migration-id"]


def test_a_restart_does_not_touch_the_machine(seen: dict[str, Any]) -> None:
    restarted = of(seen, "restarted")
    assert restarted["before"]["MainPID"] != restarted["after"]["MainPID"]
    assert restarted["state"] == "running"
    assert restarted["check"]["invariant"]
    assert restarted["check"]["steps"] > of(seen, "there")["arrived"]["steps"]


@pytest.mark.row(46)
def test_a_daemon_that_hangs_is_started_again(seen: dict[str, Any]) -> None:
    hung = of(seen, "hung")
    assert hung["before"]["MainPID"] != hung["after"]["MainPID"]
    assert "Watchdog timeout" in of(seen, "watchdog")
    assert hung["state"] == "running"
    assert hung["check"]["invariant"]
    assert hung["check"]["steps"] > of(seen, "back")["arrived"]["steps"]


def test_the_journals_of_both_tell_one_story(seen: dict[str, Any]) -> None:
    here, there = of(seen, "journal")
    ids = [{line["migration_id"] for line in journal if "migration_id" in line} for journal in (here, there)]
    moved = {of(seen, way)["owners"][0]["migration-id"] for way in ("there", "back")}
    assert len(moved) == 2
    assert moved <= ids[0]
    assert moved <= ids[1]
    for journal in (here, there):
        assert {line["machine"] for line in journal} == {MACHINE}
        assert any(line["event"] == "tls_ready" for line in journal)


def test_an_upgrade_restarts_the_daemon_and_not_the_machine(seen: dict[str, Any]) -> None:
    upgraded = of(seen, "upgraded")
    assert "Restarting migrated@demo.service; its machine goes on." in upgraded["said"]
    assert upgraded["before"]["MainPID"] != upgraded["after"]["MainPID"]
    assert upgraded["state"] == "running"
    assert upgraded["check"]["invariant"]
    assert upgraded["check"]["steps"] > of(seen, "hung")["check"]["steps"]


def test_a_machine_that_moves_is_left_alone(seen: dict[str, Any]) -> None:
    busy = of(seen, "busy")
    assert busy["version"].endswith("-2")
    assert "migrated@demo.service still runs the version before" in busy["said"]
    for status, said in (busy["removal"], busy["arriving"]):
        assert status != 0
        assert "nothing is removed" in said
    assert busy["before"]["MainPID"] == busy["after"]["MainPID"]
    assert busy["status"] == "active"
    assert busy["state"] == "running"


def test_a_removal_stops_the_daemon_and_leaves_the_workload(seen: dict[str, Any]) -> None:
    removed = of(seen, "removed")
    assert removed["changed"] == ""
    assert "Stopping migrated@demo.service; its workload goes on" in removed["said"]
    assert removed["unit"]["ActiveState"] == "inactive"
    before, after = removed["walkers"]
    assert before == after != "0"
    assert f"/etc/migrated/{MACHINE}.toml" in removed["configuration"]
    assert "/etc/migrated/pki/server-key.pem" in removed["configuration"]
    assert removed["program"] == []


def test_a_purge_keeps_what_nobody_else_has(seen: dict[str, Any]) -> None:
    purged = of(seen, "purged")
    assert "/etc/migrated/migrated.toml" not in purged["configuration"]
    for kept in (f"{MACHINE}.toml", "ca/ca-key.pem", "pki/server-key.pem"):
        assert f"/etc/migrated/{kept}" in purged["configuration"]
    assert f"/var/lib/migrated/{MACHINE}/ownership.json" in purged["state"]
    assert "Kept, because nobody else has it: /etc/migrated" in purged["said"]
    assert purged["enabled"] == ""
    assert "installed" not in purged["known"].replace("not-installed", "")
